"""The command lines: one module per command; only this package uses argparse."""
