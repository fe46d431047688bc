"""Configuration files and the sections in them."""
