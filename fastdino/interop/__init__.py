"""Weights and checkpoints of other code bases, read safely and written as those code bases expect them."""
