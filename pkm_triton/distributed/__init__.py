"""Training on several ranks.

`data_parallel` wraps a model in `DistributedDataParallel` whose sparse and factored gradients are
averaged without ever being dense; `ignore_sparse_values` and `average_sparse_values` are its parts,
for where something else does the wrapping; `average_gradients` is for loops without it.
`fully_shard` is FSDP2's, which leaves those values alone.
`shard_memory` spreads tables that outgrow one device; `plan` says how large they may be, and
`traffic` what ranks then send each other; `new_checkpoint` and `latest_checkpoint` name folders for
`torch.distributed.checkpoint`.

Import it before `init_process_group`. A module of torch's, which its optimisers import if nothing
did before, keeps the process group that there is then, as a default argument; gloo's threads so
outlive `destroy_process_group`, and now and then abort the process as it ends. So do DTensors, by
what torch remembers of their layouts: where there are any, end with a `barrier` before it.
"""

import torch.distributed.nn.functional  # noqa: F401  (see above)

from .checkpoint_folders import latest_checkpoint, new_checkpoint
from .collective_bytes import Collective
from .data_parallel import (
    average_gradients,
    average_sparse_values,
    data_parallel,
    ignore_sparse_values,
)
from .fsdp import fully_shard
from .plan import LayoutPlan, Plan, plan
from .shard_memory import shard_memory, sharded_values
from .traffic import Traffic, traffic

__all__ = [
    "Collective",
    "LayoutPlan",
    "Plan",
    "Traffic",
    "average_gradients",
    "average_sparse_values",
    "data_parallel",
    "fully_shard",
    "ignore_sparse_values",
    "latest_checkpoint",
    "new_checkpoint",
    "plan",
    "shard_memory",
    "sharded_values",
    "traffic",
]
