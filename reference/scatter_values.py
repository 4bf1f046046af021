"""Gradients of the gather of values: a scatter-add over the table, and sampled products.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gather is S · V, the
values' gradient is Sᵀ · G and the weights' is G · Vᵀ at the places of S.

Shapes: T tokens, R reads a token, K slots, M rows that were read.
    grad_output [T, d_v]; values [K, d_v]; slots, weights [T, R]; rows [M]; grad_rows [M, d_v]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import token_chunks
from .gather_values import split_weights


def _transposed_gather(
    slots: Tensor, weights: Tensor, grad_output: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
    """Sᵀ · G: the gather with tokens as the table, bag by bag of the reads sorted into `order`.

    `offsets` [bags + 1] says where each bag begins and ends. A bag sums its reads in token order
    whatever the number of threads: the same bits every run.
    """
    token = order.div(slots.shape[1], rounding_mode="floor").to(torch.int32)
    parts = split_weights(weights.flatten()[order], grad_output.dtype)
    return F.embedding_bag(
        token.repeat_interleave(len(parts)),
        grad_output,
        offsets.to(torch.int32) * len(parts),
        per_sample_weights=torch.stack(parts, dim=-1).flatten(),
        mode="sum",
        include_last_offset=True,
    )


def _scatter_rows(slots: Tensor, weights: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were read, [M] int64, ascending, each once, and their gradient [M, d_v]."""
    ordered, order = slots.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    grad_rows = _transposed_gather(slots, weights, grad_output, order, offsets)
    return rows.to(torch.int64), grad_rows


def _scatter_table(slots: Tensor, weights: Tensor, grad_output: Tensor, num_slots: int) -> Tensor:
    """The gradient as a dense [K, d_v], zero in the rows nobody read.

    One bag a slot: empty bags write their zeros in the same pass, where clearing a table and
    copying rows into it would go over it twice.
    """
    ordered, order = slots.flatten().sort(stable=True)
    bounds = torch.arange(num_slots + 1, dtype=slots.dtype, device=slots.device)
    offsets = torch.searchsorted(ordered, bounds)
    return _transposed_gather(slots, weights, grad_output, order, offsets)


def _sampled_products(grad_output: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """<grad_output[t], values[slots[t, r]]>, [T, R], in float32 (float64 for float64)."""
    num_tokens, reads = slots.shape
    if values.dtype in (torch.float32, torch.float64):
        # The op behind the gradient of F.embedding_bag, which has no functional form of its own
        # (torch.sparse.sampled_addmm is as fast, and warns of its beta state on first use).
        bags = torch.arange(num_tokens, dtype=slots.dtype, device=slots.device)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_output,
            values,
            slots.flatten(),
            bags * reads,
            bags.repeat_interleave(reads),
            0,  # the mode: sum
        ).view(num_tokens, reads)
    # In half precision that op rounds the products' sum; here they are summed in float32.
    products = grad_output.new_empty(num_tokens, reads, dtype=torch.float32)
    for chunk in token_chunks(num_tokens, 4 * reads * values.shape[1]):
        rows = values[slots[chunk]].float()
        products[chunk] = (rows @ grad_output[chunk].float().unsqueeze(-1)).squeeze(-1)
    return products


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
        grad_output: [T, d_v], in the dtype of values.
        values: [K, d_v].
        slots: [T, R], int32.
        weights: [T, R].
        needs_values: whether the values' gradient is wanted.
        needs_weights: whether the weights' gradient is wanted.

    Returns:
        grad_values [K, d_v] and grad_weights [T, R], in the dtypes of values and weights; [0] for
        one that is not wanted.
    """
    return (
        _scatter_table(slots, weights, grad_output, values.shape[0])
        if needs_values
        else values.new_empty(0),
        _sampled_products(grad_output, values, slots).to(weights.dtype)
        if needs_weights
        else weights.new_empty(0),
    )


def gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gather_values`, the values' for the rows that were read and nothing else.

    Nothing of the size of the table, and no [T · R, d_v], is formed. Arguments as above.

    Returns:
        rows [M], int64, ascending, each once; grad_rows [M, d_v]; grad_weights as above.
    """
    rows, grad_rows = _scatter_rows(slots, weights, grad_output)
    if not needs_weights:
        return rows, grad_rows, weights.new_empty(0)
    return rows, grad_rows, _sampled_products(grad_output, values, slots).to(weights.dtype)
