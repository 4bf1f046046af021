"""Optimisers that cannot step sharded values, named where torch would speak of mixed tensors."""

import functools
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from pkm_triton._row_optimizer import RowOptimizer
from pkm_triton.sharded_gradient import ShardedGradient


@functools.cache
def watch_optimizers() -> None:
    """Look at every optimiser that holds sharded values before it steps; from the first call on."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    """Raise for an optimiser that is about to step sharded values and cannot.

    Raises:
        TypeError: if a gradient is not dense, and the optimiser none of this package.
        ValueError: if it takes several tensors at once, of which but some are DTensors.
    """
    if isinstance(optimizer, RowOptimizer):
        return
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    for index, group in enumerate(optimizer.param_groups):
        stepped = [p for p in group["params"] if p.grad is not None]
        if any(isinstance(p.grad, ShardedGradient) for p in stepped):
            raise TypeError(
                f"optimizer {name} does not take the sparse or factored gradient of a sharded "
                "memory's values: give them to pkm_triton.optim.SparseAdam, or use "
                "sparse_grad=False"
            )
        together = [option for option in ("foreach", "fused") if group.get(option)]
        if together and len({isinstance(p, DTensor) for p in stepped}) > 1:
            raise ValueError(
                f"optimizer {name} has {together[0]}=True in group {index}, of which some "
                "parameters are DTensors and others are not: give the values of sharded memories "
                "a group of their own, as pkm_triton.param_groups does"
            )
