"""A lookup and its LayerNorm as one operation, with kernels for GPU and TPU."""
