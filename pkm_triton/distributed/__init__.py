"""Training on several ranks.

`data_parallel` wraps a model in `DistributedDataParallel` whose sparse and factored gradients are
averaged without ever being dense; `ignore_sparse_values` and `average_sparse_values` are its parts,
for where something else does the wrapping; `average_gradients` is for loops without it.
`shard_memory` spreads tables that outgrow one device, and `traffic` says what that sends;
`new_checkpoint` and `latest_checkpoint` name folders for `torch.distributed.checkpoint`.
"""

from .checkpoint_folders import latest_checkpoint, new_checkpoint
from .data_parallel import (
    average_gradients,
    average_sparse_values,
    data_parallel,
    ignore_sparse_values,
)
from .shard_memory import shard_memory, sharded_values
from .traffic import Collective, Traffic, traffic

__all__ = [
    "Collective",
    "Traffic",
    "average_gradients",
    "average_sparse_values",
    "data_parallel",
    "ignore_sparse_values",
    "latest_checkpoint",
    "new_checkpoint",
    "shard_memory",
    "sharded_values",
    "traffic",
]
