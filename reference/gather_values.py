"""Gather of values: the weighted sum of the table rows each token reads (paper equation 3).

Shapes: T tokens, R = H · k reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; weights [T, R]; gate, out [T, d_v]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import token_chunks

# Rows of half precision are widened for so many elements at a time: what a cache holds.
WIDENED_ELEMENTS = 1 << 20


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 if one is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gather_values(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    dtype: torch.dtype | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """out[t] = sum over r of weights[t, r] · values[slots[t, r]], accumulated in float32.

    Args:
        values: [K, d_v].
        slots: [T, R], int32, each in [0, K).
        weights: [T, R], any floating dtype.
        dtype: of the result; by default that of `values`.
        gate: [T, d_v], in the dtype of the result, which is multiplied by silu(gate).

    Returns:
        [T, d_v]. No [T, R, d_v] is formed.
    """
    dtype = dtype or values.dtype
    if gate is not None:
        return gather_values(values, slots, weights, dtype) * F.silu(gate)
    if values.dtype == weights.dtype == dtype:
        return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
    if values.dtype in (torch.float32, torch.float64):
        weights = weights.to(values.dtype)
    elif dtype == values.dtype and _two_parts_suffice(weights, dtype):
        # F.embedding_bag wants weights of the table's dtype, in which one part would round more
        # than all else here: the remainder, rounded in turn, keeps twice as many bits.
        weights, largest = weights.float(), torch.finfo(dtype).max
        rounded = weights.clamp(-largest, largest).to(dtype)
        weights = torch.cat([rounded, (weights - rounded.float()).to(dtype)], dim=-1)
        slots = slots.repeat(1, 2)
    else:
        return _gather_widened(values, slots, weights, dtype)
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum").to(dtype)


def _two_parts_suffice(weights: Tensor, dtype: torch.dtype) -> bool:
    """Whether two parts in `dtype` keep 16 bits of a token's largest weight.

    bfloat16 has float32's range. In float16 a remainder cannot be larger than 65504, nor finer
    than 2^-24; to see whether it has to be, on a GPU, would wait for the device.
    """
    if dtype == torch.bfloat16:
        return True
    if not weights.is_cpu:
        return False
    peak = weights.abs().amax(-1)
    return bool(((peak == 0) | (peak >= 2**-8) & (peak <= torch.finfo(dtype).max)).all())


def _gather_widened(values: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The gather in float32, or float64, of rows that are widened a few at a time."""
    (num_tokens, reads), width = slots.shape, values.shape[1]
    wide = accumulation_dtype(weights.dtype, dtype)
    out = values.new_empty(num_tokens, width, dtype=dtype)
    for chunk in token_chunks(num_tokens, reads * width, WIDENED_ELEMENTS):
        rows = values.index_select(0, slots[chunk].flatten()).to(wide)
        place = torch.arange(rows.shape[0], dtype=slots.dtype, device=slots.device)
        out[chunk] = F.embedding_bag(
            place.view(-1, reads), rows, per_sample_weights=weights[chunk].to(wide), mode="sum"
        )
    return out
