"""The weights' gradient of the gather of values alone: inner products, in no order of the reads.

Shapes: T tokens, R reads a token, K slots.
    grad_output [T, d_v]; values [K, d_v]; slots, grad_weights [T, R]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs among which many reads are dealt out.
PROGRAMS = 8192


@triton.jit(do_not_specialize=["num_slots"])
def sampled_products_kernel(
    grad_output_ptr,  # [T, D_V]
    values_ptr,  # [K, D_V]
    slots_ptr,  # [T, R]
    grad_weights_ptr,  # [T, R]
    num_slots,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """A program owns READS reads of one token, and has BLOCK_R of them in flight."""
    token = tl.program_id(0).to(tl.int64)
    first_read = tl.program_id(1) * READS
    for first in tl.range(first_read, tl.minimum(first_read + READS, R), BLOCK_R, num_stages=1):
        read = first + tl.arange(0, BLOCK_R)
        slot = tl.load(slots_ptr + token * R + read, mask=read < R, other=0)
        inside = (slot >= 0) & (slot < num_slots)
        product = tl.zeros([BLOCK_R], tl.float32)
        for first_column in tl.range(0, D_V, BLOCK_V, num_stages=1):
            column = first_column + tl.arange(0, BLOCK_V)
            in_row = column < D_V
            grad = tl.load(grad_output_ptr + token * D_V + column, mask=in_row, other=0.0)
            place = slot.to(tl.int64)[:, None] * D_V + column[None, :]
            mask = (inside & (read < R))[:, None] & in_row[None, :]
            value = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(value * grad.to(tl.float32)[None, :], 1)
        product = tl.where(inside, product, float("nan"))
        product = product.to(grad_weights_ptr.dtype.element_ty)
        tl.store(grad_weights_ptr + token * R + read, product, mask=read < R)


def sampled_products(grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weights' gradient alone, which needs no order of the reads."""
    num_tokens, reads = slots.shape
    width = values.shape[1]
    grad_weights = weights.new_empty(weights.shape)
    block_v = min(triton.next_power_of_2(width), 1024)
    block_r = max(1, min(8192 // block_v, 64, triton.next_power_of_2(reads)))
    # So many programs that a few tokens fill a GPU too.
    share = block_r * max(1, num_tokens * reads // (PROGRAMS * block_r))
    sampled_products_kernel[(num_tokens, triton.cdiv(reads, share))](
        grad_output, values, slots, grad_weights, values.shape[0],
        R=reads, D_V=width, BLOCK_R=block_r, BLOCK_V=block_v, READS=share,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return grad_weights


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(dtype: torch.dtype) -> Callable[[], object]:
        grad_output = torch.empty(4096, 1024, dtype=dtype, device="meta")
        values = torch.empty(1 << 18, 1024, dtype=dtype, device="meta")
        slots = torch.empty(4096, 128, dtype=torch.int32, device="meta")
        weights = torch.empty(4096, 128, device="meta")
        return lambda: sampled_products(grad_output, values, slots, weights)

    return {
        "sampled products bfloat16 1024": call(torch.bfloat16),
        "sampled products float32 1024": call(torch.float32),
    }
