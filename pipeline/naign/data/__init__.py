"""Data sets: what can be packed, how it lies in a store, and the rounds of images that each rank trains on."""
