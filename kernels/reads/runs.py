"""Runs of reads of one row, dealt out to programs.

Shapes: T tokens, R reads a token, K slots, M rows that were read, P stretches of the reads.

The reads are sorted by slot, stably: those of a row are a run, in token order. The runs are dealt
out by stretches of the sorted reads, to one program each:
    - a run belongs to the program of the stretch it begins in, which follows it into the next;
    - a run that goes on beyond the next stretch is hot: each stretch it fills is a part of it, and
      the parts, one a stretch at most, are summed in order by a second kernel.
So a row is read once and written once however few its reads are, no program has more than two
stretches of work however many they are, and every sum has one fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..grid import grid, second_axis

# Programs that fill a GPU, and what a program is to have in reads; the latter grows with T, so
# that the parts of hot rows stay this many.
MOST_STRETCHES = 8192
LEAST_STRETCH = 8
# In a stretch's mark: no part of a hot row, or a part that is not the first.
NO_PART = tl.constexpr(-1)
LATER_PART = tl.constexpr(-2)


@triton.jit
def count_equal(ordered_ptr, start, length, slot, BLOCK: tl.constexpr):
    """How many of `length` reads from start on are of this slot."""
    count = 0
    for first in tl.range(0, length, BLOCK, num_stages=1):
        lane = first + tl.arange(0, BLOCK)
        mask = lane < length
        same = tl.load(ordered_ptr + start + lane, mask=mask, other=0) == slot
        count += tl.sum((same & mask).to(tl.int32))
    return count


@triton.jit
def share_of(ordered_ptr, num_reads, stretch, BLOCK: tl.constexpr):
    """The reads begin .. end of this program's runs.

    Also whether the first is a later part of a hot run, and whether the last is any part of one.
    """
    start = tl.program_id(0).to(tl.int64) * stretch
    stop = tl.minimum(start + stretch, num_reads)
    first = tl.load(ordered_ptr + start)
    last = tl.load(ordered_ptr + stop - 1)
    before = tl.load(ordered_ptr + start - 1, mask=start > 0, other=0)
    inherited = (start > 0) & (before == first)
    later = inherited & (first == last)
    begin = start
    if inherited & (first != last):
        begin += count_equal(ordered_ptr, start, stop - start, first, BLOCK)
    ahead = tl.minimum(num_reads - stop, stretch).to(tl.int32)
    follows = 0
    after = tl.load(ordered_ptr + stop, mask=ahead > 0, other=0)
    if (ahead > 0) & (after == last):
        follows = count_equal(ordered_ptr, stop, ahead, last, BLOCK)
    hot = (ahead > 0) & (follows == ahead)
    end = stop
    if not hot:
        end += follows
    return begin, end, later, later | hot


@triton.jit(do_not_specialize=["num_stretches"])
def sum_parts_kernel(
    parts_ptr,  # [P, D_V]
    marks_ptr,  # [P]
    grad_rows_ptr,  # [M or K, D_V]
    num_stretches,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_V columns of the hot rows whose first part is in GROUP stretches."""
    column = second_axis().to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    start = tl.program_id(0) * GROUP
    stop = tl.minimum(start + GROUP, num_stretches)
    stretches = start + tl.arange(0, GROUP)
    marks = tl.load(marks_ptr + stretches, mask=stretches < stop, other=NO_PART)
    if tl.max(marks) >= 0:
        for stretch in tl.range(start, stop, num_stages=1):
            row = tl.load(marks_ptr + stretch)
            if row >= 0:
                total = tl.zeros([1, BLOCK_V], tl.float32)
                first = stretch
                while first < num_stretches:
                    part = first + tl.arange(0, PARTS)[:, None]
                    mark = tl.load(marks_ptr + part, mask=part < num_stretches, other=NO_PART)
                    other = (mark != LATER_PART) & (part != stretch)
                    end = tl.min(tl.where(other, part, first + PARTS))
                    place = part.to(tl.int64) * D_V + column
                    mask = (part < end) & (column < D_V)
                    total += tl.sum(tl.load(parts_ptr + place, mask=mask, other=0.0), 0)[None, :]
                    first = tl.where(end == first + PARTS, end, num_stretches)
                place = tl.cast(row, tl.int64) * D_V + column
                total = total.to(grad_rows_ptr.dtype.element_ty)
                tl.store(grad_rows_ptr + place, total, mask=column < D_V)


@triton.jit(do_not_specialize=["num_reads", "num_slots", "stretch", "num_stretches"])
def count_rows_kernel(
    ordered_ptr,  # [T · R]
    counts_ptr,  # [P]
    num_reads, num_slots, stretch, num_stretches,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns STRETCHES stretches, and counts the rows whose run begins in each."""
    index = tl.program_id(0) * STRETCHES + tl.arange(0, STRETCHES)
    count = tl.zeros([STRETCHES], tl.int32)
    for first in tl.range(0, stretch, BLOCK, num_stages=1):
        lane = first + tl.arange(0, BLOCK)[None, :]
        read = index.to(tl.int64)[:, None] * stretch + lane
        mask = (lane < stretch) & (read < num_reads)
        slot = tl.load(ordered_ptr + read, mask=mask, other=-1)
        before = tl.load(ordered_ptr + read - 1, mask=mask & (read > 0), other=-1)
        begins = (slot >= 0) & (slot < num_slots) & (slot != before)
        count += tl.sum(begins.to(tl.int32), 1)
    tl.store(counts_ptr + index, count, mask=index < num_stretches)


def deal_out(num_reads: int, width: int) -> tuple[int, int, int]:
    """Reads of a stretch, how many stretches there are, and the columns of a program."""
    stretch = max(LEAST_STRETCH, triton.cdiv(num_reads, MOST_STRETCHES))
    block_v = max(32, min(triton.next_power_of_2(width), 2048))
    return stretch, triton.cdiv(num_reads, stretch), block_v


def count_rows(ordered: Tensor, num_slots: int, stretch: int, stretches: int) -> Tensor:
    """How many rows of the table there are up to the end of each stretch, [P] int64."""
    counts = ordered.new_empty(stretches)
    count_rows_kernel[(triton.cdiv(stretches, 32),)](
        ordered, counts, ordered.shape[0], num_slots, stretch, stretches,
        STRETCHES=32, BLOCK=64, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return counts.cumsum(0)


def sum_parts(parts: Tensor, marks: Tensor, grad_rows: Tensor) -> None:
    """Sum the parts [P, d_v] of each hot row, as `marks` [P] says, into its row of `grad_rows`."""
    stretches, width = parts.shape
    sum_parts_kernel[grid(triton.cdiv(stretches, 32), triton.cdiv(width, 32))](
        parts, marks, grad_rows, stretches,
        D_V=width, BLOCK_V=32, GROUP=32, PARTS=128, num_warps=4, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
