"""Training: prepare a run, resume it, run its rounds."""
