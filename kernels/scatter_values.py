"""Gradients of the gather of values: a scatter-add over the table, and sampled products.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gather is S · V, the
values' gradient is Sᵀ · G and the weights' is G · Vᵀ at the places of S.

Shapes: T tokens, R reads a token, K slots, M rows that were read, P stretches of the reads.
    grad_output [T, d_v]; values [K, d_v]; slots, weights [T, R]; rows [M]; grad_rows [M, d_v]

The reads are sorted by slot and dealt out to programs by runs of equal ones (see `runs`), so that a
row is read once and written once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runs import LATER_PART, NO_PART, count_rows, deal_out, share_of, sum_parts
from .sampled_products import sampled_products


@triton.jit(do_not_specialize=["num_reads", "num_slots", "stretch"])
def scatter_values_kernel(
    ordered_ptr,  # [T · R], the slots in order
    order_ptr,  # [T · R], int64, where each was
    grad_output_ptr,  # [T, D_V]
    values_ptr,  # [K, D_V]
    weights_ptr,  # [T, R]
    ends_ptr,  # [P], int64, the number of rows up to each stretch; if COMPACT
    rows_ptr,  # [M] int64 if COMPACT, else [K] uint8, ones for the rows that were read
    grad_rows_ptr,  # [M or K, D_V]
    grad_weights_ptr,  # [column blocks, T, R]
    parts_ptr,  # [P, D_V] float32
    marks_ptr,  # [P] int32: the row of which a part is first, or one of the constants above
    num_reads, num_slots, stretch,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    COMPACT: tl.constexpr, NEEDS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of the rows whose runs, or whose part, fall to its stretch."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = column < D_V
    # What is written once a row is written with the first columns.
    first_columns = tl.program_id(1) == 0
    begin, end, later, part = share_of(ordered_ptr, num_reads, stretch, BLOCK)
    if NEEDS_WEIGHTS:
        grad_weights_ptr += tl.program_id(1).to(tl.int64) * num_reads
    rank = tl.cast(-1, tl.int64)
    if COMPACT:
        rank += tl.load(ends_ptr + program - 1, mask=program > 0, other=0)
    total = tl.zeros([BLOCK_V], tl.float32)
    value = tl.zeros([BLOCK_V], tl.float32)
    # The next read's gradient is asked for before this one's is used.
    slot = tl.load(ordered_ptr + begin)
    read = tl.load(order_ptr + begin)
    grad = tl.load(grad_output_ptr + read // R * D_V + column, mask=in_row, other=0.0)
    weight = tl.load(weights_ptr + read)
    fresh = True
    inside = False
    place = tl.cast(0, tl.int64)
    for position in tl.range(begin, end, num_stages=1):
        more = position + 1 < end
        next_slot = tl.load(ordered_ptr + position + 1, mask=more, other=0)
        next_read = tl.load(order_ptr + position + 1, mask=more, other=0)
        next_place = next_read // R * D_V + column
        next_mask = column < tl.where(more, D_V, 0)
        next_grad = tl.load(grad_output_ptr + next_place, mask=next_mask, other=0.0)
        next_weight = tl.load(weights_ptr + next_read, mask=more, other=0.0)
        last = (next_slot != slot) | (position + 1 >= end)
        grad_float = grad.to(tl.float32)
        if fresh:
            # A slot out of range adds to no row, and its weight's gradient is NaN.
            inside = (slot >= 0) & (slot < num_slots)
            total = tl.zeros([BLOCK_V], tl.float32)
            if COMPACT:
                rank += (inside & ((position != begin) | ~later)).to(tl.int64)
                place = rank
            else:
                place = slot.to(tl.int64)
            if NEEDS_WEIGHTS:
                row = slot.to(tl.int64) * D_V + column
                mask = column < tl.where(inside, D_V, 0)
                value = tl.load(values_ptr + row, mask=mask, other=0.0).to(tl.float32)
        factor = tl.broadcast_to(weight.to(tl.float32), [BLOCK_V])
        total = tl.fma(grad_float, factor, total)
        if NEEDS_WEIGHTS:
            product = tl.where(inside, tl.sum(grad_float * value), float("nan"))
            tl.store(grad_weights_ptr + read, product.to(grad_weights_ptr.dtype.element_ty))
        if last:
            whole = inside & ~(part & (position + 1 >= end))
            row = total.to(grad_rows_ptr.dtype.element_ty)
            mask = column < tl.where(whole, D_V, 0)
            tl.store(grad_rows_ptr + place * D_V + column, row, mask=mask)
            begins = inside & (~later | (position + 1 < end)) & first_columns
            if COMPACT:
                tl.store(rows_ptr + place, slot.to(tl.int64), mask=begins)
            else:
                tl.store(rows_ptr + place, tl.full([], 1, tl.uint8), mask=begins)
            if position + 1 >= end:
                mark = NO_PART
                if part:
                    tl.store(parts_ptr + program.to(tl.int64) * D_V + column, total, mask=in_row)
                    mark = tl.where(inside, place.to(tl.int32), NO_PART)
                    mark = tl.where(later, LATER_PART, mark)
                tl.store(marks_ptr + program, mark, mask=first_columns)
        fresh = last
        slot = next_slot
        read = next_read
        grad = next_grad
        weight = next_weight


@triton.jit(do_not_specialize=["num_slots"])
def clear_unread_kernel(
    read_ptr,  # [K] uint8
    grad_values_ptr,  # [K, D_V]
    num_slots,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of ROWS rows of the table."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    unread = (row < num_slots) & (tl.load(read_ptr + row, mask=row < num_slots, other=1) == 0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    zero = tl.zeros([ROWS, BLOCK_V], grad_values_ptr.dtype.element_ty)
    tl.store(grad_values_ptr + row * D_V + column, zero, mask=unread & (column < D_V))


def scatter(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_weights: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows and grad_rows if `compact`, else a flag a row and a table; and grad_weights."""
    reads = slots.shape[1]
    num_reads = slots.numel()
    num_slots, width = values.shape
    ordered, order = slots.flatten().sort(stable=True)
    stretch, stretches, block_v = deal_out(num_reads, width)
    column_blocks = triton.cdiv(width, block_v)
    # 128 registers a thread hold a row's sum, its value and the next gradient without spilling.
    row_bytes = block_v * max(grad_output.element_size(), values.element_size())
    warps = 1 if row_bytes <= 2048 else row_bytes // 1024
    marks = slots.new_empty(stretches)
    if compact:
        ends = count_rows(ordered, num_slots, stretch, stretches)
        # The host has to know the number of rows, to allocate them: here it waits for the device.
        rows = ends.new_empty(stretches if ends.is_meta else int(ends[-1]))
        grad_rows = values.new_empty(rows.shape[0], width)
    else:
        ends = order
        rows = slots.new_zeros(num_slots, dtype=torch.uint8)
        grad_rows = values.new_empty(values.shape)
    parts = values.new_empty(stretches, width, dtype=torch.float32)
    if not needs_weights:
        grad_weights = weights.new_empty(0)
    elif column_blocks == 1:
        grad_weights = weights.new_empty(weights.shape)
    else:
        grad_weights = weights.new_empty(column_blocks, *weights.shape, dtype=torch.float32)
    scatter_values_kernel[(stretches, column_blocks)](
        ordered, order, grad_output, values, weights, ends, rows, grad_rows, grad_weights, parts,
        marks, num_reads, num_slots, stretch,
        R=reads, D_V=width, BLOCK_V=block_v, BLOCK=64, COMPACT=compact,
        NEEDS_WEIGHTS=needs_weights, num_warps=warps, num_stages=1, maxnreg=128,
        enable_fp_fusion=True,
    )  # fmt: skip
    sum_parts(parts, marks, grad_rows)
    if needs_weights and column_blocks > 1:
        grad_weights = grad_weights.sum(0).to(weights.dtype)
    return rows, grad_rows, grad_weights


def gather_values_backward(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `gather_values`, the values' as a dense table; the host never waits.

    Args:
        grad_output: [T, d_v].
        values: [K, d_v].
        slots: [T, R], int32. One out of [0, K) adds to no row, and its weight's gradient is NaN.
        weights: [T, R].
        needs_values: whether the values' gradient is wanted.
        needs_weights: whether the weights' gradient is wanted.

    Returns:
        grad_values [K, d_v] and grad_weights [T, R], in the dtypes of values and weights; [0] for
        one that is not wanted.
    """
    if not needs_values:
        if not needs_weights:
            return values.new_empty(0), weights.new_empty(0)
        return values.new_empty(0), sampled_products(grad_output, values, slots, weights)
    num_slots, width = values.shape
    read, grad_values, grad_weights = scatter(
        grad_output, values, slots, weights, needs_weights, compact=False
    )
    block_v = min(triton.next_power_of_2(width), 1024)
    clear_unread_kernel[(triton.cdiv(num_slots, 16), triton.cdiv(width, block_v))](
        read, grad_values, num_slots,
        D_V=width, BLOCK_V=block_v, ROWS=16, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return grad_values, grad_weights


def gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gather_values`, the values' for the rows that were read and nothing else.

    Nothing of the size of the table, and no [T · R, d_v], is formed. The host waits once, for the
    number of rows. Arguments as above.

    Returns:
        rows [M], int64, ascending, each once; grad_rows [M, d_v]; grad_weights as above.
    """
    return scatter(grad_output, values, slots, weights, needs_weights, compact=True)


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        dtype: torch.dtype, width: int, compact: bool, needs_weights: bool
    ) -> Callable[[], object]:
        grad_output = torch.empty(4096, width, dtype=dtype, device="meta")
        values = torch.empty(1 << 18, width, dtype=dtype, device="meta")
        slots = torch.empty(4096, 128, dtype=torch.int32, device="meta")
        weights = torch.empty(4096, 128, device="meta")
        inputs = grad_output, values, slots, weights
        if compact:
            return lambda: gather_values_backward_sparse(*inputs, needs_weights)
        return lambda: gather_values_backward(*inputs, True, needs_weights)

    return {
        "scatter sparse bfloat16 1024": call(torch.bfloat16, 1024, True, True),
        "scatter dense bfloat16 1024": call(torch.bfloat16, 1024, False, True),
        "scatter sparse float32 1024": call(torch.float32, 1024, True, True),
        "scatter values alone bfloat16 1024": call(torch.bfloat16, 1024, True, False),
    }
