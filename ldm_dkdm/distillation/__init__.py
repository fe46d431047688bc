"""Distillation: pool, warm-up, stream and the student's Lightning module."""
