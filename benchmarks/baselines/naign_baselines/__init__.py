"""The baselines that NAIGN is compared with: IGN, its prior, a normalised autoencoder, a VAE and a rectified flow."""
