"""Bitonic sorting of the rows of a tensor, and the best of the candidates of some rows.

`tl.topk` is the same network; here the partner of an element comes from a sum instead of an
exclusive or, which Triton's interpreter reduces by a hundred times as fast.
"""

import triton
import triton.language as tl

from ..select.entries import entry_score, sort_key

NOTHING = tl.constexpr(-0x8000000000000000)
EVERYTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.constexpr_function
def log2(n):
    """The exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def bit_of(axis: tl.constexpr, AXES: tl.constexpr):
    """0 and 1 along one of some axes of two, counted from the last."""
    return tl.reshape(tl.arange(0, 2), [1] * (AXES - axis - 1) + [2] + [1] * axis)


@triton.jit
def exchange(x, ascending, AXIS: tl.constexpr):
    """Order pairs along an axis of two, counted from the last: downwards where ascending is 0."""
    other = tl.sum(x, len(x.shape) - 1 - AXIS, keep_dims=True) - x
    return tl.where((x > other) == (bit_of(AXIS, len(x.shape)) == ascending), x, other)


@triton.jit
def merge_bitonic(x, ascending, STEPS: tl.constexpr):
    """Sort the bitonic sequences along the last STEPS axes of two."""
    for step in tl.static_range(STEPS):
        x = exchange(x, ascending, STEPS - 1 - step)
    return x


@triton.jit
def top_sorted(x, TOP: tl.constexpr):
    """The TOP largest of each row of x [R, N], descending; both powers of two, all else unique."""
    LOG_TOP: tl.constexpr = log2(TOP)
    LOG_N: tl.constexpr = log2(x.shape[1])
    h = tl.reshape(x, [2] * log2(x.numel))
    for step in tl.static_range(1, LOG_TOP + 1):
        if step < LOG_N:
            h = merge_bitonic(h, bit_of(step, len(h.shape)), step)
        else:
            h = merge_bitonic(h, 0, step)
    for step in tl.static_range(LOG_TOP + 1, LOG_N + 1):
        h = tl.max(h, len(h.shape) - 1 - LOG_TOP)
        if step < LOG_N:
            h = merge_bitonic(h, bit_of(LOG_TOP, len(h.shape)), LOG_TOP)
        else:
            h = merge_bitonic(h, 0, LOG_TOP)
    return tl.reshape(h, [x.shape[0], TOP])


@triton.jit
def merge(best, other):
    """The largest of two tensors [R, TOP], each descending, in that order."""
    h = tl.reshape(tl.maximum(best, tl.flip(other, 1)), [2] * log2(best.numel))
    return tl.reshape(merge_bitonic(h, 0, log2(best.shape[1])), best.shape)


@triton.jit
def best_candidates(list_ptr, count_ptr, below, splits, slots, C: tl.constexpr):
    """The best sort keys below a bound [R, 1] in the lists of each row, descending, [R, TOP].

    list_ptr, count_ptr: [R, 1], the first split's of each row. slots: entries from a split's list
    to the next one's.
    """
    ROWS: tl.constexpr = C.list_rows
    AT_ONCE: tl.constexpr = C.splits
    TOP: tl.constexpr = C.top
    WIDTH: tl.constexpr = 2 * TOP
    best = tl.full([list_ptr.shape[0], TOP], NOTHING, tl.int64)
    empty = True
    column = tl.arange(0, AT_ONCE * WIDTH)[None, :]
    for first in tl.range(0, splits, AT_ONCE, num_stages=1):
        if AT_ONCE == 1:
            split = tl.full([1, 1], 0, tl.int32) + first
        else:
            split = first + column // WIDTH
        count = tl.load(count_ptr + split * ROWS, mask=split < splits, other=0)
        list_of_split = list_ptr + split.to(tl.int64) * slots * ROWS
        for start in tl.range(0, tl.max(count), WIDTH, num_stages=1):
            slot = start + column % WIDTH
            inside = slot < count
            entry = tl.load(list_of_split + slot.to(tl.int64) * ROWS, mask=inside, other=0)
            key = sort_key(entry_score(entry), entry.to(tl.int32))
            if C.in_turns:
                inside &= key < below
            key = top_sorted(tl.where(inside, key, NOTHING), TOP)
            if empty:
                best = key
            else:
                best = merge(best, key)
            empty = False
    return best
