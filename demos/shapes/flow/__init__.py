"""The flow-matching sibling of the embedded pipeline: the same world in a joint transformer."""
