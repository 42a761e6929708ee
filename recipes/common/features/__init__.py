"""Statistics and smoothing of tokens and features."""
