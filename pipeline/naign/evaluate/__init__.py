"""Evaluation of a trained network: Frechet distance, coverage, restoration, a report."""
