"""Trained modules, attached as editors from their official checkpoints."""
