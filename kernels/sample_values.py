"""Sampled products: of each token with the table rows it reads; the adjoint of the gather.

Shapes: T tokens, R reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; x [T, d_v]; products [T, R]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import grid, second_axis

# Programs among which many reads are dealt out.
PROGRAMS = 8192


@triton.jit(do_not_specialize=["num_slots"])
def sample_values_kernel(
    values_ptr,  # [K, D_V]
    slots_ptr,  # [T, R]
    x_ptr,  # [T, D_V]
    products_ptr,  # [T, R]
    num_slots,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """A program owns READS reads of one token, and has BLOCK_R of them in flight."""
    token = tl.program_id(0).to(tl.int64)
    first_read = second_axis() * READS
    for first in tl.range(first_read, tl.minimum(first_read + READS, R), BLOCK_R, num_stages=1):
        read = first + tl.arange(0, BLOCK_R)
        slot = tl.load(slots_ptr + token * R + read, mask=read < R, other=0)
        # A slot out of range reads nothing and shows as NaN.
        inside = (slot >= 0) & (slot < num_slots)
        product = tl.zeros([BLOCK_R], tl.float32)
        for first_column in tl.range(0, D_V, BLOCK_V, num_stages=1):
            column = first_column + tl.arange(0, BLOCK_V)
            in_row = column < D_V
            x = tl.load(x_ptr + token * D_V + column, mask=in_row, other=0.0).to(tl.float32)
            place = slot.to(tl.int64)[:, None] * D_V + column[None, :]
            mask = (inside & (read < R))[:, None] & in_row[None, :]
            value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(value * x[None, :], 1)
        product = tl.where(inside, product, float("nan"))
        product = product.to(products_ptr.dtype.element_ty)
        tl.store(products_ptr + token * R + read, product, mask=read < R)


def tile(reads: int, width: int) -> tuple[int, int]:
    """Reads in flight, and columns of them: 8192 elements at most."""
    block_v = min(triton.next_power_of_2(max(1, width)), 1024)
    return max(1, min(8192 // block_v, 64, triton.next_power_of_2(max(1, reads)))), block_v


def sample_values(
    values: Tensor, slots: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """products[t, r] = <x[t], values[slots[t, r]]>, accumulated in float32.

    Args:
        values: [K, d_v].
        slots: [T, R], int32. One outside [0, K) reads nothing, and its product is NaN.
        x: [T, d_v].
        dtype: of the result; by default float32.

    Returns:
        [T, R].
    """
    num_tokens, reads = slots.shape
    num_slots, width = values.shape
    products = values.new_empty(num_tokens, reads, dtype=dtype or torch.float32)
    if products.numel() == 0:
        return products
    block_r, block_v = tile(reads, width)
    # So many programs that a few tokens fill a GPU too.
    share = block_r * max(1, num_tokens * reads // (PROGRAMS * block_r))
    sample_values_kernel[grid(num_tokens, triton.cdiv(reads, share))](
        values, slots, x, products, num_slots,
        R=reads, D_V=width, BLOCK_R=block_r, BLOCK_V=block_v, READS=share,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return products


def sample_values_bytes(
    num_tokens: int, reads: int, width: int, values_bytes: int, x_bytes: int, products_bytes: int
) -> int:
    """What `sample_values` reads and writes: each read of a row, and x once a tile of reads."""
    block_r, _ = tile(reads, width)
    rows = num_tokens * reads * width * values_bytes
    own = num_tokens * triton.cdiv(reads, block_r) * width * x_bytes
    return rows + own + num_tokens * reads * (4 + products_bytes)


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(num_tokens: int, dtype: torch.dtype, width: int) -> Callable[[], object]:
        values = torch.empty(1 << 18, width, dtype=dtype, device="meta")
        slots = torch.empty(num_tokens, 128, dtype=torch.int32, device="meta")
        x = torch.empty(num_tokens, width, dtype=dtype, device="meta")
        return lambda: sample_values(values, slots, x)

    return {
        "sample few bfloat16 1024": call(1, torch.bfloat16, 1024),
        "sample many bfloat16 1024": call(4096, torch.bfloat16, 1024),
        "sample many float32 1024": call(4096, torch.float32, 1024),
        "sample many bfloat16 100": call(4096, torch.bfloat16, 100),
    }
