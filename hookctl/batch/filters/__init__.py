"""Which draws are kept: what a draw is, how it is measured, and which images are there already."""
