"""The baselines that NAIGN is compared with: IGN and the normalised autoencoder, on the same networks and data."""
