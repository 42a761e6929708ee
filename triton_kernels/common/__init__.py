"""What the kernels share: devices, launches and their tables, stretches of keys, pieces of code."""
