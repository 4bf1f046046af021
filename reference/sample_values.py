"""Sampled products: of each token with the table rows it reads; the adjoint of the gather.

Shapes: T tokens, R reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; x [T, d_v]; products [T, R]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import token_chunks
from .gather_values import accumulation_dtype

# Rows are copied, a few at a time that stay in a thread's cache, and then multiplied: copying asks
# for many rows at once, where multiplying waits for one after another.
CACHED_ELEMENTS = 1 << 18

# On a CPU the BLAS library's dot product rounds by where a row begins within so many bytes.
ROW_BYTES = 16


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
    (num_tokens, reads), width = slots.shape, values.shape[1]
    wide = accumulation_dtype(values.dtype, x.dtype)
    x = x.to(wide)
    padding = (0, -width % (ROW_BYTES // x.element_size()))
    if padding[1] or not _rows_aligned(x):
        x = F.pad(x, padding)
    at_once = CACHED_ELEMENTS * torch.get_num_threads()
    copied = values.dtype != wide or slots.numel() * width > at_once
    if not copied and not padding[1] and _rows_aligned(values):
        return _sample(values, slots, x).to(dtype or wide)
    products = values.new_empty(num_tokens, reads, dtype=dtype or wide)
    for chunk in token_chunks(num_tokens, reads * width, at_once):
        rows = values.index_select(0, slots[chunk].flatten()).to(wide)
        rows = F.pad(rows, padding) if padding[1] else rows
        place = torch.arange(rows.shape[0], dtype=slots.dtype, device=slots.device)
        products[chunk] = _sample(rows, place.view(-1, reads), x[chunk])
    return products


def _rows_aligned(x: Tensor) -> bool:
    return not (x.data_ptr() % ROW_BYTES or x.stride(0) * x.element_size() % ROW_BYTES)


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
