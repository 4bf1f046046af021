"""Scatter of values, the gather's adjoint, and the gradients of the gather in one pass.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gather is S · V, the
scatter Sᵀ · X, and the sampled products X · Vᵀ at the places of S. The values' gradient is a
scatter, the weights' a sample, of the gradient of the gather's output.

Shapes: T tokens, R reads a token, K slots, M rows that were read.
    slots [T, R] int32; weights [T, R]; x, grad_output [T, d_v]; values [K, d_v];
    rows [M] int64; row_sums [M, d_v]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import token_chunks
from .gather_values import WIDENED_ELEMENTS, accumulation_dtype
from .sample_values import sample_values


def scatter_values(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype | None = None
) -> Tensor:
    """table[s] = sum of weights[t, r] · x[t] over the reads of slot s, accumulated in float32.

    Args:
        slots: [T, R], int32, each in [0, num_slots).
        weights: [T, R], any floating dtype.
        x: [T, d_v].
        num_slots: K.
        dtype: of the result; by default that of x.

    Returns:
        [K, d_v], zero in the rows nobody read.
    """
    # One bag a slot: empty bags write their zeros in the same pass, where clearing a table and
    # copying rows into it would go over it twice.
    ordered, order = slots.flatten().sort(stable=True)
    bounds = torch.arange(num_slots + 1, dtype=slots.dtype, device=slots.device)
    offsets = torch.searchsorted(ordered, bounds)
    return _sum_bags(slots, weights, x, order, offsets, dtype or x.dtype)


def scatter_values_sparse(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`scatter_values`, of the rows that were read and nothing else.

    Nothing of the size of the table, and no [T · R, d_v], is formed. Arguments as above.

    Returns:
        rows [M], int64, ascending, each once; row_sums [M, d_v].
    """
    ordered, order = slots.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return rows.to(torch.int64), _sum_bags(slots, weights, x, order, offsets, dtype or x.dtype)


def _sum_bags(
    slots: Tensor,
    weights: Tensor,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Sᵀ · X: the gather with tokens as the table, bag by bag of the reads sorted into `order`.

    `offsets` [bags + 1] says where each bag begins and ends. A bag sums its reads in token order
    whatever the number of threads: the same bits every run.
    """
    index = torch.int32 if order.numel() < 2**31 else torch.int64
    token = order.div(slots.shape[1], rounding_mode="floor").to(index)
    weights = weights.flatten()[order]
    wide = accumulation_dtype(x.dtype, dtype)
    if not x.dtype == weights.dtype == dtype:
        x, weights = x.to(wide), weights.to(wide)
    if x.dtype == dtype:
        return _bags(token, weights, x, offsets.to(index))
    # Sums in float32 are rounded before there are many.
    sums = x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=dtype)
    for chunk in token_chunks(sums.shape[0], x.shape[1], WIDENED_ELEMENTS):
        bounds = offsets[chunk.start : chunk.stop + 1]
        begin, end = int(bounds[0]), int(bounds[-1])
        bounds = (bounds - begin).to(index)
        sums[chunk] = _bags(token[begin:end], weights[begin:end], x, bounds)
    return sums


def _bags(token: Tensor, weights: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.embedding_bag(
        token, x, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def gather_values_backward(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gather_values`, the values' as a dense table.

    Args:
        grad_output: [T, d_v].
        values: [K, d_v].
        slots: [T, R], int32.
        weights: [T, R].
        needs_values: whether the values' gradient is wanted.
        needs_weights: whether the weights' gradient is wanted.

    Returns:
        grad_values [K, d_v] and grad_weights [T, R], in the dtypes of values and weights; [0] for
        one that is not wanted.
    """
    grad_values, grad_weights = values.new_empty(0), weights.new_empty(0)
    if needs_values:
        grad_values = scatter_values(slots, weights, grad_output, values.shape[0], values.dtype)
    if needs_weights:
        grad_weights = sample_values(values, slots, grad_output, weights.dtype)
    return grad_values, grad_weights


def gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gather_values`, the values' for the rows that were read and nothing else.

    Arguments as above.

    Returns:
        rows and their gradient as of `scatter_values_sparse`; grad_weights as above.
    """
    rows, grad_rows = scatter_values_sparse(
        slots, weights, grad_output, values.shape[0], values.dtype
    )
    grad_weights = weights.new_empty(0)
    if needs_weights:
        grad_weights = sample_values(values, slots, grad_output, weights.dtype)
    return rows, grad_rows, grad_weights
