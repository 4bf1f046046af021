"""Scatter of values, the gather's adjoint, and the gradients of the gather in one pass.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gather is S · V, the
scatter Sᵀ · X, and the sampled products X · Vᵀ at the places of S. The values' gradient is a
scatter, the weights' a sample, of the gradient of the gather's output.

Shapes: T tokens, R reads a token, K slots, M rows that were read, P stretches of the reads.
    slots, weights [T, R]; x, grad_output [T, d_v]; values [K, d_v]; rows [M]; row_sums [M, d_v]

The reads are sorted by slot and dealt out to programs by runs of equal ones (see `runs`), so that a
row is read once and written once.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import register_bound
from .grid import grid, second_axis
from .reads.runs import LATER_PART, NO_PART, count_rows, deal_out, share_of, sum_parts
from .sample_values import sample_values


@triton.jit(do_not_specialize=["num_reads", "num_slots", "stretch"])
def scatter_values_kernel(
    ordered_ptr,  # [T · R], the slots in order
    order_ptr,  # [T · R], int64, where each was
    x_ptr,  # [T, D_V]
    values_ptr,  # [K, D_V]
    weights_ptr,  # [T, R]
    ends_ptr,  # [P], int64, the number of rows up to each stretch; if COMPACT
    rows_ptr,  # [M] int64 if COMPACT, else [K] uint8, ones for the rows that were read
    row_sums_ptr,  # [M or K, D_V]
    products_ptr,  # [column blocks, T, R]
    parts_ptr,  # [P, D_V] float32
    marks_ptr,  # [P] int32: the row of which a part is first, or a constant of `runs`
    num_reads, num_slots, stretch,
    R: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    COMPACT: tl.constexpr, NEEDS_PRODUCTS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of the rows whose runs, or whose part, fall to its stretch."""
    program = tl.program_id(0)
    block = second_axis()
    column = block * BLOCK_V + tl.arange(0, BLOCK_V)
    in_row = column < D_V
    # What is written once a row is written with the first columns.
    first_columns = block == 0
    begin, end, later, part = share_of(ordered_ptr, num_reads, stretch, BLOCK)
    if NEEDS_PRODUCTS:
        products_ptr += block.to(tl.int64) * num_reads
    rank = tl.cast(-1, tl.int64)
    if COMPACT:
        rank += tl.load(ends_ptr + program - 1, mask=program > 0, other=0)
    total = tl.zeros([BLOCK_V], tl.float32)
    value = tl.zeros([BLOCK_V], tl.float32)
    # The next read's token is asked for before this one's is used.
    slot = tl.load(ordered_ptr + begin)
    read = tl.load(order_ptr + begin)
    x = tl.load(x_ptr + read // R * D_V + column, mask=in_row, other=0.0)
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
        next_x = tl.load(x_ptr + next_place, mask=next_mask, other=0.0)
        next_weight = tl.load(weights_ptr + next_read, mask=more, other=0.0)
        last = (next_slot != slot) | (position + 1 >= end)
        x_float = x.to(tl.float32)
        if fresh:
            # A slot out of range adds to no row, and its product is NaN.
            inside = (slot >= 0) & (slot < num_slots)
            total = tl.zeros([BLOCK_V], tl.float32)
            if COMPACT:
                rank += (inside & ((position != begin) | ~later)).to(tl.int64)
                place = rank
            else:
                place = slot.to(tl.int64)
            if NEEDS_PRODUCTS:
                row = slot.to(tl.int64) * D_V + column
                mask = column < tl.where(inside, D_V, 0)
                value = tl.load(values_ptr + row, mask=mask, other=0.0).to(tl.float32)
        factor = tl.broadcast_to(weight.to(tl.float32), [BLOCK_V])
        total = tl.fma(x_float, factor, total)
        if NEEDS_PRODUCTS:
            product = tl.where(inside, tl.sum(x_float * value), float("nan"))
            product = product.to(products_ptr.dtype.element_ty)
            tl.store(products_ptr + read, product, mask=block * BLOCK_V < D_V)
        if last:
            whole = inside & ~(part & (position + 1 >= end))
            row = total.to(row_sums_ptr.dtype.element_ty)
            mask = column < tl.where(whole, D_V, 0)
            tl.store(row_sums_ptr + place * D_V + column, row, mask=mask)
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
        x = next_x
        weight = next_weight


@triton.jit(do_not_specialize=["num_slots"])
def clear_unread_kernel(
    read_ptr,  # [K] uint8
    table_ptr,  # [K, D_V]
    num_slots,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of ROWS rows of the table."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    unread = (row < num_slots) & (tl.load(read_ptr + row, mask=row < num_slots, other=1) == 0)
    column = second_axis() * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    zero = tl.zeros([ROWS, BLOCK_V], table_ptr.dtype.element_ty)
    tl.store(table_ptr + row * D_V + column, zero, mask=unread & (column < D_V))


def scatter(
    slots: Tensor,
    weights: Tensor,
    x: Tensor,
    rows_like: Tensor,
    values: Tensor | None,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows and row_sums if `compact`, else a flag a row and a table; and the sampled products.

    The sums are of the shape and dtype of rows_like [K, d_v], of which nothing else is asked for;
    the products are made of values [K, d_v], or if None are [0].
    """
    reads = slots.shape[1]
    num_reads = slots.numel()
    num_slots, width = rows_like.shape
    ordered, order = slots.flatten().sort(stable=True)
    stretch, stretches, block_v = deal_out(num_reads, width)
    column_blocks = triton.cdiv(width, block_v)
    # 128 registers a thread hold a row's sum, its value and the next gradient without spilling.
    row_bytes = block_v * max(x.element_size(), rows_like.element_size())
    warps = 1 if row_bytes <= 2048 else row_bytes // 1024
    marks = slots.new_empty(stretches)
    if compact:
        ends = count_rows(ordered, num_slots, stretch, stretches)
        # The host has to know the number of rows, to allocate them: here it waits for the device.
        rows = ends.new_empty(stretches if ends.is_meta else int(ends[-1]))
        row_sums = rows_like.new_empty(rows.shape[0], width)
    else:
        ends = order
        rows = slots.new_zeros(num_slots, dtype=torch.uint8)
        row_sums = rows_like.new_empty(num_slots, width)
    parts = x.new_empty(stretches, width, dtype=torch.float32)
    if values is None:
        products = weights.new_empty(0)
    elif column_blocks == 1:
        products = weights.new_empty(weights.shape)
    else:
        products = weights.new_empty(column_blocks, *weights.shape, dtype=torch.float32)
    scatter_values_kernel[grid(stretches, column_blocks)](
        ordered, order, x, x if values is None else values, weights, ends, rows, row_sums, products,
        parts, marks, num_reads, num_slots, stretch,
        R=reads, D_V=width, BLOCK_V=block_v, BLOCK=64, COMPACT=compact,
        NEEDS_PRODUCTS=values is not None, num_warps=warps, num_stages=1,
        enable_fp_fusion=True, **register_bound(x.device, 128),
    )  # fmt: skip
    sum_parts(parts, marks, row_sums)
    if values is not None and column_blocks > 1:
        products = products.sum(0).to(weights.dtype)
    return rows, row_sums, products


def clear_unread(read: Tensor, table: Tensor) -> None:
    """Write zeros to the rows of table [K, d_v] whose flag, read [K], is not set."""
    num_slots, width = table.shape
    block_v = min(triton.next_power_of_2(width), 1024)
    clear_unread_kernel[grid(triton.cdiv(num_slots, 16), triton.cdiv(width, block_v))](
        read, table, num_slots,
        D_V=width, BLOCK_V=block_v, ROWS=16, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


def scatter_values(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype | None = None
) -> Tensor:
    """table[s] = sum of weights[t, r] · x[t] over the reads of slot s; the host never waits.

    Args:
        slots: [T, R], int32. One outside [0, num_slots) adds to no row.
        weights: [T, R].
        x: [T, d_v].
        num_slots: K.
        dtype: of the result; by default that of x.

    Returns:
        [K, d_v], zero in the rows nobody read; summed in float32.
    """
    like = x.new_empty(1, 1, dtype=dtype).expand(num_slots, x.shape[1])
    read, table, _ = scatter(slots, weights, x, like, None, compact=False)
    clear_unread(read, table)
    return table


def scatter_values_sparse(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`scatter_values`, of the rows that were read and nothing else.

    Nothing of the size of the table, and no [T · R, d_v], is formed. The host waits once, for the
    number of rows. Arguments as above.

    Returns:
        rows [M], int64, ascending, each once; row_sums [M, d_v].
    """
    like = x.new_empty(1, 1, dtype=dtype).expand(num_slots, x.shape[1])
    rows, row_sums, _ = scatter(slots, weights, x, like, None, compact=True)
    return rows, row_sums


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
        return values.new_empty(0), sample_values(values, slots, grad_output, weights.dtype)
    table = values if needs_weights else None
    read, grad_values, grad_weights = scatter(
        slots, weights, grad_output, values, table, compact=False
    )
    clear_unread(read, grad_values)
    return grad_values, grad_weights


def gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gather_values`, the values' for the rows that were read and nothing else.

    Arguments as above.

    Returns:
        rows and their gradient as of `scatter_values_sparse`; grad_weights as above.
    """
    table = values if needs_weights else None
    return scatter(slots, weights, grad_output, values, table, compact=True)


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.empty(4096, 1024, dtype=dtype, device="meta"),
            torch.empty(1 << 18, 1024, dtype=dtype, device="meta"),
            torch.empty(4096, 128, dtype=torch.int32, device="meta"),
            torch.empty(4096, 128, device="meta"),
        )

    half, single = inputs(torch.bfloat16), inputs(torch.float32)
    x, values, slots, weights = half
    return {
        "scatter sparse bfloat16 1024": lambda: gather_values_backward_sparse(*half, True),
        "scatter dense bfloat16 1024": lambda: gather_values_backward(*half, True, True),
        "scatter sparse float32 1024": lambda: gather_values_backward_sparse(*single, True),
        "scatter values alone bfloat16 1024": lambda: scatter_values_sparse(
            slots, weights, x, values.shape[0]
        ),
    }
