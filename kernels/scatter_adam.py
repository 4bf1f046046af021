"""Adam on the rows that were read, from the reads themselves: no gradient of the table is stored.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gradient is Sᵀ · G.

Shapes: T tokens, R reads a token, K slots, P stretches of the reads.
    param, exp_avg, exp_avg_sq, master [K, d_v]; grad_output [T, d_v]; slots, weights [T, R]

The reads are sorted and dealt out to programs by runs (see `runs`); a program that has summed a
row makes the step on it at once. Hot rows alone are summed from parts, at most one a stretch, and
make their step in a launch of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import grid, second_axis
from .reads.runs import LATER_PART, NO_PART, deal_out, share_of, sum_parts
from .sparse_adam import AdamOptions, adam_arguments, adam_update, update_rows


@triton.jit(do_not_specialize=["num_reads", "num_slots", "stretch", "seed", "step"])
def scatter_adam_kernel(
    param_ptr,  # [K, D_V]
    exp_avg_ptr,  # [K, D_V]
    exp_avg_sq_ptr,  # [K, D_V]
    master_ptr,  # [K, D_V] float32; if MASTER
    scalars_ptr,  # [2]: step size and decay; if ON_DEVICE
    step_ptr,  # []; if ON_DEVICE
    ordered_ptr,  # [T · R], the slots in order
    order_ptr,  # [T · R], int64, where each was
    grad_output_ptr,  # [T, D_V]
    weights_ptr,  # [T, R]
    parts_ptr,  # [P, D_V] float32
    marks_ptr,  # [P] int32: its own number where a part is first, else a constant above
    hot_rows_ptr,  # [P] int64: the row of which a part is first, else -1
    num_reads, num_slots, stretch, step_size, decay, first_share, second_share, eps, seed, step,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    MAXIMIZE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of the rows whose runs, or whose part, fall to its stretch."""
    if ON_DEVICE:
        step_size = tl.load(scalars_ptr)
        decay = tl.load(scalars_ptr + 1)
        step = tl.load(step_ptr).to(tl.int32)
    program = tl.program_id(0)
    column_block = second_axis()
    column = column_block.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = column < D_V
    begin, end, later, part = share_of(ordered_ptr, num_reads, stretch, BLOCK)
    total = tl.zeros([BLOCK_V], tl.float32)
    # The next read's gradient is asked for before this one's is used.
    slot = tl.load(ordered_ptr + begin)
    read = tl.load(order_ptr + begin)
    grad = tl.load(grad_output_ptr + read // R * D_V + column, mask=in_row, other=0.0)
    weight = tl.load(weights_ptr + read)
    for position in tl.range(begin, end, num_stages=1):
        more = position + 1 < end
        next_slot = tl.load(ordered_ptr + position + 1, mask=more, other=0)
        next_read = tl.load(order_ptr + position + 1, mask=more, other=0)
        next_place = next_read // R * D_V + column
        next_mask = column < tl.where(more, D_V, 0)
        next_grad = tl.load(grad_output_ptr + next_place, mask=next_mask, other=0.0)
        next_weight = tl.load(weights_ptr + next_read, mask=more, other=0.0)
        factor = tl.broadcast_to(weight.to(tl.float32), [BLOCK_V])
        total = tl.fma(grad.to(tl.float32), factor, total)
        if (next_slot != slot) | (position + 1 >= end):
            inside = (slot >= 0) & (slot < num_slots)
            if part & (position + 1 >= end):
                tl.store(parts_ptr + program.to(tl.int64) * D_V + column, total, mask=in_row)
            else:
                adam_update(
                    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr,
                    slot.to(tl.int64) * D_V + column, column < tl.where(inside, D_V, 0), total,
                    step_size, decay, first_share, second_share, eps, seed, step, MAXIMIZE, MASTER,
                    STOCHASTIC,
                )  # fmt: skip
            total = tl.zeros([BLOCK_V], tl.float32)
            if position + 1 >= end:
                first = part & inside & ~later
                mark = tl.where(part & later, LATER_PART, tl.where(first, program, NO_PART))
                tl.store(marks_ptr + program, mark, mask=column_block == 0)
                hot_row = tl.where(first, slot, -1).to(tl.int64)
                tl.store(hot_rows_ptr + program, hot_row, mask=column_block == 0)
        slot = next_slot
        read = next_read
        grad = next_grad
        weight = next_weight


def scatter_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_output: Tensor,
    slots: Tensor,
    weights: Tensor,
    **options: Any,
) -> None:
    """One step of Adam on the rows that were read, in place; the host never waits.

    The same as `gather_values_backward_sparse` and then `sparse_adam`, but that a gradient in half
    precision is not rounded in between. Beside the sorted reads it takes at most 8192 rows of
    float32 or, if that is less, one for each 8 reads.

    Args:
        param: [K, d_v], updated in place.
        exp_avg: [K, d_v], updated in place.
        exp_avg_sq: likewise.
        grad_output: [T, d_v], the gradient of the gather's output.
        slots: [T, R], int32. One out of [0, K) is passed over.
        weights: [T, R].
        **options: see `AdamOptions`.
    """
    num_slots, width = param.shape
    ordered, order = slots.flatten().sort(stable=True)
    stretch, stretches, block_v = deal_out(slots.numel(), width)
    parts = param.new_empty(stretches, width, dtype=torch.float32)
    marks = slots.new_empty(stretches)
    hot_rows = order.new_empty(stretches)
    arguments = adam_arguments(param, exp_avg, exp_avg_sq, AdamOptions(**options))
    scatter_adam_kernel[grid(stretches, triton.cdiv(width, block_v))](
        *arguments.tensors, ordered, order, grad_output, weights, parts, marks, hot_rows,
        slots.numel(), num_slots, stretch, *arguments.numbers,
        R=slots.shape[1], D_V=width, BLOCK_V=block_v, BLOCK=64, num_warps=max(1, block_v // 256),
        **arguments.constants,
    )  # fmt: skip
    sum_parts(parts, marks, parts)
    update_rows(hot_rows, parts, arguments)


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(dtype: torch.dtype, width: int) -> Callable[[], object]:
        param = torch.empty(1 << 18, width, dtype=dtype, device="meta")
        moments = [torch.empty(1 << 18, width, device="meta") for _ in range(2)]
        grad_output = torch.empty(4096, width, dtype=dtype, device="meta")
        slots = torch.empty(4096, 128, dtype=torch.int32, device="meta")
        weights = torch.empty(4096, 128, device="meta")
        return lambda: scatter_adam(
            param, *moments, grad_output, slots, weights, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=0.0, step=1, stochastic_rounding=True,
        )  # fmt: skip

    return {
        "scatter and adam bfloat16 1024": call(torch.bfloat16, 1024),
        "scatter and adam float32 1024": call(torch.float32, 1024),
        "scatter and adam float32 100": call(torch.float32, 100),
    }
