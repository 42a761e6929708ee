"""Trained modules in the key layouts of their official files: tensors in, tensors out."""
