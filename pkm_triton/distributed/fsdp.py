"""FSDP2 around memories."""

from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import fully_shard as _fully_shard

from .data_parallel import left_out

_M = TypeVar("_M", bound=nn.Module)


def fully_shard(module: _M, **options: Any) -> _M:
    """`torch.distributed.fsdp.fully_shard` that leaves alone the values of some memories.

    Those are the values that `shard_memory` has spread or replicated, whose gradients need nothing
    more, and the whole ones with sparse or factored gradients, which FSDP2 cannot reduce:
    `average_gradients` does after each backward pass. Other values are parameters as any. Mixed
    precision leaves the dtype of what is left alone as it is. As torch's, it is called on the
    layers of a model first, and on the model last.

    Args:
        module: any module.
        **options: those of torch's.

    Returns:
        The module, changed in place.
    """
    values = {table for layer in left_out(module) for table in layer.tables}
    ignored = values | set(options.pop("ignored_params", None) or ())
    _fully_shard(module, ignored_params=ignored, **options)
    return module
