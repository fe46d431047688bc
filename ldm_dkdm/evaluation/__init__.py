"""Measure students and check teachers, without data."""
