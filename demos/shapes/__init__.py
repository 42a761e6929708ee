"""The embedded pipeline: its world, renderer, detector, trainer and loader."""
