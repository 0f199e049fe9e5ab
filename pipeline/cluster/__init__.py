"""From an orchestrator to Accelerate: where this host stands, when all are there, and how the ranks ended."""
