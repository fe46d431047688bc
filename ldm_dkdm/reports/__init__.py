"""A page about runs: read their folders, draw their curves, write one HTML file."""
