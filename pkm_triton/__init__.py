"""Product-key memory for PyTorch: Triton kernels, a layer, and a perf harness."""
