"""Lists of candidates in memory, and their sorting.

A program keeps a list for each of its ROWS rows, in memory that stays in cache: slot s of row r is
at list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index. Slot
LIST of a list is its head: a bound (see `ordered`) that the k best reach, above the length.
"""

import triton
import triton.language as tl

from .sorting import (
    lists_a_warp,
    sort_ranks,
    sort_rows,
    sort_top,
    warps_of_lists,
    wide_each,
)


@triton.jit
def ordered(bits):
    """The int32 that orders as the float32 with these bits does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def bits_of(entry):
    """The bits of an entry's score."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def score_of(entry):
    """An entry's score."""
    return bits_of(entry).to(tl.float32, bitcast=True)


@triton.jit
def ordered_pair(bits, index):
    """The int64 that orders by score, NaN first, then by lower index."""
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, ordered(bits))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def narrow_key(bits, bound, mask, slot, LOG_SIZE: tl.constexpr):
    """An int32 that orders by score, then by lower slot, and whether it does so exactly.

    It holds how far a score is above its list's bound, as far as that fits above the slot's
    LOG_SIZE bits. Scores below the bound, of which the k best do without, are all one.
    """
    above = ordered(bits) - bound
    wanted = mask & (ordered(bits) >= bound)
    # Compared unsigned, a difference beyond int32 is too large as well.
    exact = ~wanted | (above.to(tl.uint32, bitcast=True) < 2 ** (31 - LOG_SIZE))
    key = tl.where(wanted, above, -1) << LOG_SIZE
    return key | (2**LOG_SIZE - 1 - slot), exact


@triton.jit
def narrow_slot(key, LOG_SIZE: tl.constexpr):
    """The slot in a key of `narrow_key`."""
    return 2**LOG_SIZE - 1 - (key & (2**LOG_SIZE - 1))


@triton.jit
def sort_wide(
    list_ptr, top_ptr, first_row, top_k, ROWS: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr, EACH: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Sort some lists as `sort_lists` does, whatever they hold."""
    row = first_row + sort_rows(HIGH, LOW)
    length = tl.load(list_ptr + 2**LOG_LIST * ROWS + row).to(tl.int32)
    slot = sort_ranks(EACH, 2**LOG_LIST // EACH)
    entry = tl.load(list_ptr + slot * ROWS + row, mask=slot < length, other=0)
    key = ordered_pair(bits_of(entry), entry & 0x7FFFFFFF)
    key = sort_top(tl.where(slot < length, key, -0x8000000000000000), LOG_LIST, LOG_TOP)
    best = (ordered(bits_of(key)).to(tl.int64) << 32) | (0x7FFFFFFF - (key & 0x7FFFFFFF))
    rank = sort_ranks(EACH, 2**LOG_TOP // EACH)
    tl.debug_barrier()
    tl.store(top_ptr + rank * ROWS + row, best, mask=rank < top_k)


@triton.jit
def sort_lists(
    list_ptr, top_ptr, top_k, ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_LIST: tl.constexpr,
    LOG_SHORT: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Copy the top_k best entries of each list, in order, to the same row at top_ptr.

    top_k <= 2 ** LOG_TOP; top_ptr may be list_ptr. Nearly always the lists fit 2 ** LOG_SHORT
    entries, and their scores lie so near each other that an int32 orders them exactly, four times
    cheaper to sort than the int64 that always does.
    """
    EACH: tl.constexpr = 8
    LANES: tl.constexpr = 2**LOG_SHORT // EACH
    LOW: tl.constexpr = lists_a_warp(ROWS, LANES)
    HIGH: tl.constexpr = warps_of_lists(ROWS // LOW, WARPS, LANES * LOW)
    WIDE_EACH: tl.constexpr = wide_each(LOG_LIST)
    WIDE_LOW: tl.constexpr = lists_a_warp(ROWS, 2**LOG_LIST // WIDE_EACH)
    WIDE_HIGH: tl.constexpr = warps_of_lists(
        HIGH * LOW // WIDE_LOW, WARPS, 2**LOG_LIST // WIDE_EACH * WIDE_LOW
    )
    slot = sort_ranks(EACH, LANES)
    rank = sort_ranks(EACH, 2**LOG_TOP // EACH)
    for first_row in tl.range(0, ROWS, HIGH * LOW, num_stages=1, disable_licm=True):
        row = first_row + sort_rows(HIGH, LOW)
        head = tl.load(list_ptr + 2**LOG_LIST * ROWS + row)
        length = head.to(tl.int32)
        mask = slot < length
        entry = tl.load(list_ptr + slot * ROWS + row, mask=mask, other=0)
        key, exact = narrow_key(bits_of(entry), bits_of(head), mask, slot, LOG_SHORT)
        exact = exact & (length <= 2**LOG_SHORT)
        if tl.min(exact.to(tl.int32)) != 0:
            slots = narrow_slot(sort_top(key, LOG_SHORT, LOG_TOP), LOG_SHORT)
            best = tl.load(list_ptr + slots * ROWS + row)
            # All of a list is read before its start is written.
            tl.debug_barrier()
            tl.store(top_ptr + rank * ROWS + row, best, mask=rank < top_k)
        else:
            for wide_row in tl.range(
                first_row,
                first_row + HIGH * LOW,
                WIDE_HIGH * WIDE_LOW,
                num_stages=1,
                disable_licm=True,
            ):
                sort_wide(
                    list_ptr, top_ptr, wide_row, top_k, ROWS, WIDE_HIGH, WIDE_LOW, WIDE_EACH,
                    LOG_LIST, LOG_TOP,
                )  # fmt: skip


@triton.jit
def merge_lists(
    list_ptr, parts, top_k, ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_LIST: tl.constexpr,
    LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Sort lists that are each the concatenation of `parts` sorted lists of top_k entries."""
    row = tl.arange(0, ROWS)
    bound = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.range(1, parts + 1, num_stages=1, disable_licm=True):
        bound = tl.maximum(bound, score_of(tl.load(list_ptr + (part * top_k - 1) * ROWS + row)))
    head = ordered(bound.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    tl.store(list_ptr + 2**LOG_LIST * ROWS + row, head | (parts * top_k))
    tl.debug_barrier()
    sort_lists(list_ptr, list_ptr, top_k, ROWS, WARPS, LOG_LIST, LOG_LIST, LOG_TOP)
    tl.debug_barrier()
