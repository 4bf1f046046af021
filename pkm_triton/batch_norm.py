"""Batch norm of queries: padding left out, and statistics over all ranks of a process group."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank; differentiable."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SynchronisedBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose statistics are those of all ranks' rows together.

    Made by `synchronise_batch_norm`, used by `QueryNetwork`. In training every rank must call it
    as often as the others, with any number of rows.
    """

    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, norm: nn.BatchNorm1d, group: dist.ProcessGroup | None) -> "SynchronisedBatchNorm":
        """The synchronised twin of `norm`, over the same parameters and statistics."""
        twin = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        twin.group = group
        twin.track_running_stats = norm.track_running_stats
        twin._parameters.update(norm._parameters)
        twin._buffers.update(norm._buffers)
        return twin.train(norm.training)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """`input` [T, features], normalised by the rows of all ranks where mask [T] is True."""
        together = dist.is_initialized() and dist.get_world_size(self.group) > 1
        if self.training and together:
            if mask is None:
                mask = input.new_ones(input.shape[0], dtype=torch.bool)
            return _explicit(self, input, mask, lambda x: _SumOverRanks.apply(x, self.group))
        if input.shape[0] == 0:
            return input
        if self.training and mask is not None:
            return _explicit(self, input, mask)
        return super().forward(input)


def batch_norm(norm: _BatchNorm, rows: Tensor, mask: Tensor | None) -> Tensor:
    """`norm(rows)` with statistics of the rows [T, features] where mask [T] is True."""
    if isinstance(norm, SynchronisedBatchNorm):
        return norm(rows, mask)
    if rows.shape[0] == 0:
        return rows
    if mask is None or not norm.training:
        return norm(rows)
    if isinstance(norm, nn.SyncBatchNorm):
        # Ranks may hold different numbers of tokens; picking them costs a wait for the device,
        # which the exchange of statistics costs anyway.
        return torch.zeros_like(rows).masked_scatter(mask.unsqueeze(-1), norm(rows[mask]))
    return _explicit(norm, rows, mask)


def _explicit(
    norm: _BatchNorm,
    rows: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Batch norm in training with a mask, of fixed shapes and without a copy to the host.

    As `nn.BatchNorm1d`: the biased variance normalises, the unbiased one enters the running
    statistics. With no token left the running statistics stay as they are. `total` adds up the
    sums of several ranks.
    """
    real = mask.unsqueeze(-1)
    wide = rows.float() if rows.dtype != torch.float64 else rows
    wide = wide.masked_fill(~real, 0)
    sums = total(torch.cat([wide.sum(0), mask.sum().to(wide).unsqueeze(0)]))
    count = sums[-1].detach()
    divisor = count.clamp(min=1)
    mean = sums[:-1] / divisor
    centred = (wide - mean).masked_fill(~real, 0)
    variance = total(centred.square().sum(0)) / divisor
    if norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            seen = (count > 0).to(torch.int64)
            norm.num_batches_tracked.add_(seen)
            share = norm.momentum
            step = 1 / norm.num_batches_tracked.clamp(min=1) if share is None else share
            step = step * seen
            unbiased = variance * divisor / (divisor - 1).clamp(min=1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), step.to(norm.running_mean))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), step.to(norm.running_var))
    scaled = centred * (variance + norm.eps).rsqrt()
    if norm.affine:
        scaled = scaled * norm.weight + norm.bias
    return scaled.to(rows.dtype)
