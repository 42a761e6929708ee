"""Parts of a canvas, and images in the company of others."""
