"""Training on data (Alg. 2): what distillation is compared with, and what makes teachers."""
