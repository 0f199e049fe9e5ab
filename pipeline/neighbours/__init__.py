"""Exact nearest neighbours of whole data sets: copies of training images among samples, near-duplicates in a set."""
