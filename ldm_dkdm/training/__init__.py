"""Whole runs: what the scripts call. The loop, its folder, its checkpoints, and one file per kind of run."""
