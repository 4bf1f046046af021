"""Sampled products: of each token with the table rows it reads; the adjoint of the gather.

Shapes: T tokens, R reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; x [T, d_v]; products [T, R]
"""

import torch
from torch import Tensor

from .chunks import token_chunks
from .gather_values import accumulation_dtype

# Rows are copied, a few at a time that stay in a thread's cache, and then multiplied: copying asks
# for many rows at once, where multiplying waits for one after another.
CACHED_ELEMENTS = 1 << 18


def sample_values(
    values: Tensor, slots: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """products[t, r] = <x[t], values[slots[t, r]]>, accumulated in float32.

    Args:
        values: [K, d_v].
        slots: [T, R], int32, each in [0, K).
        x: [T, d_v], any floating dtype.
        dtype: of the result; by default float32 (float64 if an input is float64).

    Returns:
        [T, R]. No [T, R, d_v] is formed.
    """
    num_tokens, reads = slots.shape
    wide = accumulation_dtype(values.dtype, x.dtype)
    at_once = CACHED_ELEMENTS * torch.get_num_threads()
    if values.dtype == wide and slots.numel() * values.shape[1] <= at_once:
        return _sample(values, slots, x.to(wide)).to(dtype or wide)
    products = values.new_empty(num_tokens, reads, dtype=dtype or wide)
    for chunk in token_chunks(num_tokens, reads * values.shape[1], at_once):
        rows = values.index_select(0, slots[chunk].flatten()).to(wide)
        place = torch.arange(rows.shape[0], dtype=slots.dtype, device=slots.device)
        products[chunk] = _sample(rows, place.view(-1, reads), x[chunk].to(wide))
    return products


def _sample(values: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    # The op behind the gradient of F.embedding_bag, which has no functional form of its own
    # (torch.sparse.sampled_addmm is as fast, and warns of its beta state on first use).
    num_tokens, reads = slots.shape
    bags = torch.arange(num_tokens, dtype=slots.dtype, device=slots.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x,
        values,
        slots.flatten(),
        bags * reads,
        bags.repeat_interleave(reads),
        0,  # the mode: sum
    ).view(num_tokens, reads)
