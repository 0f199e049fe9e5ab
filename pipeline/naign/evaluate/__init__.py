"""Evaluation of a trained network: Frechet distance, coverage, restoration, density, a report."""
