"""What the kernels on reads share: reads sorted and dealt out, and products with sparse tiles."""
