"""The ranks of a training: the engine that runs the network on them, and how they agree, stop and end together."""
