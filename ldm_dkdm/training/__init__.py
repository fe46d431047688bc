"""Training runs: the loop, its folder, its checkpoints, and one module per kind of run."""
