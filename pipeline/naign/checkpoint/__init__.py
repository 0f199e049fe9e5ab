"""Checkpoints: folders of files with a manifest written last, here and in a bucket."""
