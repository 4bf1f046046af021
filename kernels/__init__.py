"""Triton kernels of product-key memory, one op a file."""
