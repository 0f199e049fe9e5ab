"""From an orchestrator to Accelerate: where this host stands (place), when all are there (meeting), launch, render."""
