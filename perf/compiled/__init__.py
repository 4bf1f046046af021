"""What the compiler makes of the kernels, without a GPU."""
