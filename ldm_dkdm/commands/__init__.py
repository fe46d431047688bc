"""The command lines: one file a command; argparse lives here and nowhere else."""
