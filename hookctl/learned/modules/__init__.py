"""The trained networks themselves, with the names and shapes of their official checkpoints.

Plain torch modules: they know tensors only, no hooks and no pipelines.
"""
