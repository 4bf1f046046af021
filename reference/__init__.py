"""Pure PyTorch twins of the kernels: same files, names and signatures; the CPU backend."""
