"""The baselines that NAIGN is compared with: IGN, a normalised autoencoder, a VAE and a rectified flow."""
