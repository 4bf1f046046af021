"""Training on several ranks.

`data_parallel` wraps a model in `DistributedDataParallel` whose sparse and factored gradients are
averaged without ever being dense; `ignore_sparse_values` and `average_sparse_values` are its parts,
for where something else does the wrapping; `average_gradients` is for loops without it.
"""

from .data_parallel import (
    average_gradients,
    average_sparse_values,
    data_parallel,
    ignore_sparse_values,
)

__all__ = [
    "average_gradients",
    "average_sparse_values",
    "data_parallel",
    "ignore_sparse_values",
]
