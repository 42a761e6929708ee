"""Trained modules over the frozen embedded pipeline, one file for each kind."""
