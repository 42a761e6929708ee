"""Learned modules: official checkpoints, attached to unmodified models as editors."""
