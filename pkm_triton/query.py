"""The query network: from a token to one query a head (paper 3.1, query generation)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ._checks import check_integer

QueryNorm = Literal["batch", "layer"] | None


class QueryNetwork(nn.Module):
    """A linear map, or an MLP with ReLU, that makes a query a head, then a normalisation.

    Batch norm on the query spreads the reads over the memory (paper 4.5, Table 2). It works on all
    H · d_q features, so each head has statistics of its own; masked tokens are left out of them.

    Args:
        dim: width of a token.
        heads: queries a token.
        query_dim: width of a query, d_q.
        norm: "batch", "layer" (over a head's d_q features) or None.
        hidden: widths of hidden layers; () for a linear map.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if a size is below 1, or norm unknown.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        query_dim: int,
        norm: QueryNorm = "batch",
        hidden: Sequence[int] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = check_integer("heads", heads, 1)
        self.query_dim = check_integer("query_dim", query_dim, 1)
        widths = [check_integer("dim", dim, 1)]
        widths += [check_integer("query_hidden", width, 1) for width in hidden]
        layers: list[nn.Module] = []
        for width, next_width in zip(widths, [*widths[1:], heads * query_dim], strict=True):
            if layers:
                layers.append(nn.ReLU())
            layers.append(nn.Linear(width, next_width, device=device, dtype=dtype))
        self.layers = nn.Sequential(*layers)
        self.norm: nn.Module
        if norm == "batch":
            self.norm = nn.BatchNorm1d(heads * query_dim, device=device, dtype=dtype)
        elif norm == "layer":
            self.norm = nn.LayerNorm(query_dim, device=device, dtype=dtype)
        elif norm is None:
            self.norm = nn.Identity()
        else:
            raise ValueError(f"query_norm is {norm!r}, but must be 'batch', 'layer' or None")

    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as torch.nn does."""
        for module in (*self.layers, self.norm):
            if isinstance(module, (nn.Linear, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)):
                module.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [..., H, d_q] of tokens x [..., dim]; mask [...] is False where x is padding."""
        query: Tensor = self.layers(x)
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            # nn.SyncBatchNorm.convert_sync_batchnorm may have put its own module here.
            rows = query.reshape(math.prod(x.shape[:-1]), query.shape[-1])
            query = _batch_norm(self.norm, rows, None if mask is None else mask.flatten())
            return query.view(*x.shape[:-1], self.heads, self.query_dim)
        return self.norm(query.unflatten(-1, (self.heads, self.query_dim)))


def _batch_norm(norm: nn.modules.batchnorm._BatchNorm, rows: Tensor, mask: Tensor | None) -> Tensor:
    """`norm(rows)` with statistics of the rows [T, features] where mask [T] is True."""
    if rows.shape[0] == 0:
        return rows
    if mask is None or not norm.training:
        return norm(rows)
    if isinstance(norm, nn.SyncBatchNorm):
        # Ranks may hold different numbers of tokens; picking them costs a wait for the device,
        # which the exchange of statistics costs anyway.
        return torch.zeros_like(rows).masked_scatter(mask.unsqueeze(-1), norm(rows[mask]))
    return _masked_batch_norm(norm, rows, mask)


def _masked_batch_norm(norm: nn.modules.batchnorm._BatchNorm, rows: Tensor, mask: Tensor) -> Tensor:
    """Batch norm in training with a mask, of fixed shapes and without a copy to the host.

    As `nn.BatchNorm1d`: the biased variance normalises, the unbiased one enters the running
    statistics. With no token left the running statistics stay as they are.
    """
    real = mask.unsqueeze(-1)
    wide = rows.float() if rows.dtype != torch.float64 else rows
    wide = wide.masked_fill(~real, 0)
    count = mask.sum()
    divisor = count.clamp(min=1)
    mean = wide.sum(0) / divisor
    centred = (wide - mean).masked_fill(~real, 0)
    variance = centred.square().sum(0) / divisor
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
