"""Gather of values: the weighted sum of the table rows each token reads (paper equation 3).

Shapes: T tokens, R = H · k reads a token, K slots.
    values [K, d_v]; slots [T, R] int32; weights [T, R]; gate, out [T, d_v]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import grid, second_axis


@triton.jit(do_not_specialize=["num_slots"])
def gather_values_kernel(
    values_ptr,  # [K, D_V]
    slots_ptr,  # [T, R]
    weights_ptr,  # [T, R]
    gate_ptr,  # [T, D_V], read if GATED
    out_ptr,  # [T, D_V]
    num_slots,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of one token's output, and has BLOCK_R reads in flight."""
    token = tl.program_id(0).to(tl.int64)
    column = second_axis() * BLOCK_V + tl.arange(0, BLOCK_V)
    out = tl.zeros([BLOCK_V], tl.float32)
    for first in tl.range(0, R, BLOCK_R):
        read = first + tl.arange(0, BLOCK_R)
        slot = tl.load(slots_ptr + token * R + read, mask=read < R, other=0)
        weight = tl.load(weights_ptr + token * R + read, mask=read < R, other=0.0).to(tl.float32)
        # A slot out of range reads nothing and shows as NaN.
        inside = (slot >= 0) & (slot < num_slots)
        weight = tl.where(inside, weight, float("nan"))
        place = slot.to(tl.int64)[:, None] * D_V + column[None, :]
        mask = (inside & (read < R))[:, None] & (column < D_V)[None, :]
        rows = tl.load(values_ptr + place, mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(rows * weight[:, None], 0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        gate = tl.load(gate_ptr + token * D_V + column, mask=column < D_V, other=0.0)
        gate = gate.to(tl.float32)
        # Rounded where the two operations, done one after the other, round.
        silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
        out = out.to(dtype).to(tl.float32) * silu
    tl.store(out_ptr + token * D_V + column, out.to(dtype), mask=column < D_V)


# Reads in flight and columns of a program, and its warps: for few tokens, whose columns must
# fill the chip, and for many.
FEW_TOKENS = 32
FEW = {"BLOCK_R": 128, "BLOCK_V": 16, "num_warps": 8}
MANY = {"BLOCK_R": 8, "BLOCK_V": 1024, "num_warps": 4}


def choose_shape(num_tokens: int, reads: int, width: int) -> dict[str, int]:
    """The constants and options of a launch, not larger than what there is."""
    shape = dict(FEW if num_tokens <= FEW_TOKENS else MANY)
    shape["BLOCK_R"] = min(shape["BLOCK_R"], triton.next_power_of_2(max(1, reads)))
    shape["BLOCK_V"] = min(shape["BLOCK_V"], triton.next_power_of_2(width))
    return shape


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
        slots: [T, R], int32. One outside [0, K) reads nothing and makes its token's output NaN.
        weights: [T, R].
        dtype: of the result; by default that of `values`.
        gate: [T, d_v], in the dtype of the result, which is multiplied by silu(gate).

    Returns:
        [T, d_v].
    """
    num_tokens, reads = slots.shape
    num_slots, width = values.shape
    out = values.new_empty(num_tokens, width, dtype=dtype or values.dtype)
    if out.numel() == 0:
        return out
    shape = choose_shape(num_tokens, reads, width)
    gather_values_kernel[grid(num_tokens, triton.cdiv(width, shape["BLOCK_V"]))](
        values, slots, weights, out if gate is None else gate, out, num_slots, R=reads, D_V=width,
        GATED=gate is not None, num_stages=1, enable_fp_fusion=True, **shape,
    )  # fmt: skip
    return out


def gather_values_bytes(
    num_tokens: int,
    reads: int,
    width: int,
    values_bytes: int,
    weights_bytes: int,
    gated: bool = False,
) -> int:
    """What `gather_values` reads and writes, each read of a row counted."""
    columns = triton.cdiv(width, choose_shape(num_tokens, reads, width)["BLOCK_V"])
    rows = num_tokens * reads * width * values_bytes
    return (
        rows
        + columns * num_tokens * reads * (4 + weights_bytes)
        + (2 if gated else 1) * num_tokens * width * values_bytes
    )


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        num_tokens: int, dtype: torch.dtype, width: int, gated: bool = False
    ) -> Callable[[], object]:
        values = torch.empty(1 << 18, width, dtype=dtype, device="meta")
        slots = torch.empty(num_tokens, 128, dtype=torch.int32, device="meta")
        weights = torch.empty(num_tokens, 128, device="meta")
        gate = values[:num_tokens] if gated else None
        return lambda: gather_values(values, slots, weights, gate=gate)

    return {
        "gather few bfloat16 1024": call(1, torch.bfloat16, 1024),
        "gather many bfloat16 1024": call(4096, torch.bfloat16, 1024),
        "gather gated many bfloat16 1024": call(4096, torch.bfloat16, 1024, True),
        "gather many float32 1024": call(4096, torch.float32, 1024),
        "gather many bfloat16 100": call(4096, torch.bfloat16, 100),
    }
