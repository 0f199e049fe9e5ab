"""From an orchestrator to Accelerate: this host's place in its job, the meeting of all hosts, launch, and render."""
