"""Gather of values: the weighted sum of the table rows each token reads (paper equation 3).

Shapes: T tokens, R = H · k reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; weights [T, R]; out [T, d_v]
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_weights(weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """`weights` as a sum of one or two tensors of `dtype`, the dtype `F.embedding_bag` asks for.

    Rounding float32 weights to bfloat16 would cost more than all other rounding here; the
    remainder, rounded in turn, keeps 16 bits of them (22 in float16).
    """
    rounded = weights.to(dtype)
    if weights.dtype == dtype or torch.finfo(weights.dtype).eps > torch.finfo(dtype).eps:
        return [rounded]
    return [rounded, (weights - rounded.to(weights.dtype)).to(dtype)]


def gather_values(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """out[t] = sum over r of weights[t, r] · values[slots[t, r]], accumulated in float32.

    Args:
        values: [K, d_v].
        slots: [T, R], int32, each in [0, K).
        weights: [T, R], any floating dtype.

    Returns:
        [T, d_v] in the dtype of `values`. No [T, R, d_v] is formed.
    """
    if weights.dtype != values.dtype:
        parts = split_weights(weights, values.dtype)
        weights, slots = torch.cat(parts, dim=-1), slots.repeat(1, len(parts))
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
