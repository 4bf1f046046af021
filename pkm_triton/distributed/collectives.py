"""What a sharded memory sends: its reads to every rank, and what was read of them back.

Functional collectives, so that the compiler sees them. Shapes: T tokens of this rank, T_all of all
P ranks, R reads a token; a table [K, d_v], of which this rank has d_r columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .layouts import Cut

# What functional collectives are made of, whose Python names change with torch's versions.
_ops = torch.ops._c10d_functional


class Route(NamedTuple):
    """Between whom a call's tokens go.

    Attributes:
        counts: the tokens of each rank.
        rank: this one.
        cut: how the table lies over the ranks.
        group: their process group.
    """

    counts: list[int]
    rank: int
    cut: Cut
    group: Any


def gather_tokens(x: Tensor, route: Route) -> Tensor:
    """`x` [T, ...] of all ranks, one after another; no gradient."""
    counts, tokens = route.counts, x.shape[0]
    most = max(counts)
    if most == 0:
        return x
    if most > tokens:
        x = torch.cat([x, x.new_zeros(most - tokens, *x.shape[1:])])
    all_ = _ops.all_gather_into_tensor(x.contiguous(), len(counts), route.group.group_name)
    all_ = _ops.wait_tensor(all_)
    if min(counts) < most:
        parts = all_.split(most)
        all_ = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return all_


def gather_weights(
    weights: Tensor, slots: Tensor, owned: Tensor | None, route: Route, wire: torch.dtype
) -> Tensor:
    """Weights [T_all, R] of all ranks, zero where this rank has not the row; differentiable.

    The gradient of a rank's weights is that of the ranks that have the rows, times P (see
    `return_sums`).

    Args:
        weights: [T, R], this rank's.
        slots: [T, R], the rows that they are of.
        owned: [T_all, R], whether this rank has the row; None: all of them.
        route: between whom.
        wire: the dtype in which weights are sent; their gradient is sent in their own.
    """
    return _GatherWeights.apply(weights, slots, owned, route, wire)


def return_sums(sums: Tensor, route: Route) -> Tensor:
    """This rank's tokens [T, d_v] of what all ranks have summed of all; differentiable.

    The loss is the mean over ranks: the gradient is divided by P, so that of a table that all
    ranks share it is right.

    Args:
        sums: [T_all, d_r], of this rank's part of the table.
        route: between whom.
    """
    # In two steps: the sums of all are forgotten before this rank's are added up.
    received = _Exchange.apply(sums, route)
    del sums
    return _AddUp.apply(received, route)


class _GatherWeights(Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        slots: Tensor,
        owned: Tensor | None,
        route: Route,
        wire: torch.dtype,
    ) -> Tensor:
        ctx.route = route
        ctx.save_for_backward(*[slots] * (owned is not None))
        all_ = gather_tokens(weights.to(wire), route).to(weights.dtype)
        return all_ if owned is None else all_.masked_fill_(~owned, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), route = grads, ctx.route
        reads, ranks, tokens = grad.shape[1], len(route.counts), route.counts[route.rank]
        send = [count * reads for count in route.counts]
        parts = _all_to_all(grad.reshape(-1), send, [tokens * reads] * ranks, route.group)
        parts = parts.view(ranks, tokens, reads)
        if ctx.saved_tensors:
            # Here it is known whose row each is: no rank keeps that of all tokens.
            (slots,) = ctx.saved_tensors
            for part, (i, _) in zip(parts, route.cut.parts, strict=True):
                low, high = route.cut.rows[i]
                part.masked_fill_((slots < low) | (slots >= high), 0)
        return parts.sum(0) * ranks, None, None, None, None


class _Exchange(Function):
    """Sums [T_all, d_r] of all tokens for this rank's, rank by rank, flat."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, route: Route) -> Tensor:
        ctx.route = route
        send, receive = _sizes(route)
        return _all_to_all(sums.reshape(-1), send, receive, route.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), route = grads, ctx.route
        receive, send = _sizes(route)
        received = _all_to_all(grad, send, receive, route.group)
        return received.view(sum(route.counts), route.cut.width(route.rank)), None


class _AddUp(Function):
    """What came of each rank, as this rank's tokens [T, d_v]."""

    @staticmethod
    def forward(ctx: Any, received: Tensor, route: Route) -> Tensor:
        ctx.route = route
        _, sizes = _sizes(route)
        tokens, rows = route.counts[route.rank], len(route.cut.rows)
        parts = dict(zip(route.cut.parts, received.split(sizes), strict=True))
        columns = []
        for j, (start, stop) in enumerate(route.cut.columns):
            of_rows = [parts[i, j].view(tokens, stop - start) for i in range(rows)]
            columns.append(_sum(of_rows))
        return torch.cat(columns, 1) if len(columns) > 1 else columns[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), route = grads, ctx.route
        columns = [route.cut.columns[j] for _, j in route.cut.parts]
        sent = torch.cat([grad[:, start:stop].reshape(-1) for start, stop in columns])
        return sent.div_(len(columns)), None


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of tensors, in order, rounded once."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)


def _sizes(route: Route) -> tuple[list[int], list[int]]:
    """Elements of sums that go to each rank, and come from each."""
    tokens, width = route.counts[route.rank], route.cut.width(route.rank)
    send = [count * width for count in route.counts]
    return send, [tokens * route.cut.width(rank) for rank in range(len(route.counts))]


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    received = _ops.all_to_all_single(x.contiguous(), receive, send, group.group_name)
    return _ops.wait_tensor(received)
