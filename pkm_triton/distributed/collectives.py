"""What a sharded memory sends: its reads to every rank, and what was read of them back.

Functional collectives, so that the compiler sees them. Shapes: T tokens of this rank, P ranks,
`counts` the tokens of each rank, [P].
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# What functional collectives are made of, whose Python names change with torch's versions.
_ops = torch.ops._c10d_functional


def gather_tokens(
    x: Tensor, counts: list[int], group: Any, wire: torch.dtype, share: float = 1.0
) -> Tensor:
    """`x` [T, ...] of all ranks, one after another; differentiable.

    The gradient is the sum of those that all ranks have for this rank's tokens, in ranks' order.

    Args:
        x: this rank's.
        counts: the tokens of each rank.
        group: the process group.
        wire: the dtype in which it is sent, forward; gradients are sent in that of x.
        share: a factor of the gradient.
    """
    return _GatherTokens.apply(x, counts, group, wire, share)


def exchange(x: Tensor, send: list[int], receive: list[int], group: Any, share: float) -> Tensor:
    """Elements of x, `send[p]` to rank p, for `receive[p]` from each; differentiable.

    Args:
        x: one-dimensional.
        send: how many go to each rank.
        receive: how many come from each rank.
        group: the process group.
        share: a factor of the gradient.
    """
    return _Exchange.apply(x, send, receive, group, share)


class _GatherTokens(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], group: Any, wire: torch.dtype, share: float
    ) -> Tensor:
        ctx.counts, ctx.group, ctx.tokens, ctx.share = counts, group, x.shape[0], share
        most = max(counts)
        sent = x.to(wire)
        if most > x.shape[0]:
            sent = torch.cat([sent, sent.new_zeros(most - x.shape[0], *x.shape[1:])])
        if most == 0:
            return x.new_empty(x.shape)
        all_ = _ops.all_gather_into_tensor(sent.contiguous(), len(counts), group.group_name)
        all_ = _ops.wait_tensor(all_)
        if min(counts) < most:
            parts = all_.split(most)
            all_ = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
        return all_.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        shape, ranks = grad.shape[1:], len(ctx.counts)
        width = math.prod(shape)
        send = [count * width for count in ctx.counts]
        parts = _all_to_all(grad.reshape(-1), send, [ctx.tokens * width] * ranks, ctx.group)
        total = parts.view(ranks, ctx.tokens, *shape).sum(0)
        return total * ctx.share, None, None, None, None


class _Exchange(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any, share: float
    ) -> Tensor:
        ctx.args, ctx.share = (receive, send, group), share
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grads[0] * ctx.share, *ctx.args), None, None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = _ops.all_to_all_single(x.contiguous(), receive, send, group.group_name)
    return _ops.wait_tensor(received)
