"""Lists of candidates in memory, and their sorting.

A program keeps a list for each of its ROWS rows, in memory that stays in cache: slot s of row r is
at list_ptr + s * ROWS + r. Slots hold entries (see `entries`). Slot LIST of a list is its head: a
bound (see `ordered`) that the k best reach, or most likely do, above the length.
"""

import triton
import triton.language as tl

from .entries import (
    bits_of,
    entry_of,
    index_of,
    load_bits,
    narrow_key,
    narrow_rank,
    narrow_score,
    ordered,
    ordered_pair,
    score_of,
)
from .sorting import keys_each, lists_a_warp, ranks, sort_rows, sort_top, warps_of_lists


@triton.jit
def store_head(list_ptr, bound, count, row, ROWS: tl.constexpr, LOG_LIST: tl.constexpr):
    """Store the heads of the lists of some rows: what their best reach, and their lengths."""
    head = ordered(bound.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    tl.store(list_ptr + 2**LOG_LIST * ROWS + row, head | count.to(tl.int64))


@triton.jit
def slot_pointers(
    list_ptr, first_row, ROWS: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Where the slots of some lists are, in sort form."""
    lane = tl.arange(0, LANES)[None, None, :, None]
    own = tl.arange(0, EACH)[:, None, None, None]
    # A thread's slots are a constant apart: one address, and offsets that cost nothing.
    return (list_ptr + (lane * (EACH * ROWS) + first_row + sort_rows(HIGH, LOW))) + own * ROWS


@triton.jit
def sort_wide(
    list_ptr, first_list, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_SIZE: tl.constexpr, LOG_TOP: tl.constexpr, LISTS: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Sort LISTS lists of no more than 2 ** LOG_SIZE, whatever they hold; MOST keys a thread."""
    EACH: tl.constexpr = keys_each(LOG_TOP, MOST, LISTS, LOG_SIZE, WARPS)
    LANES: tl.constexpr = 2**LOG_SIZE // EACH
    TOP_LANES: tl.constexpr = 2**LOG_TOP // EACH
    LOW: tl.constexpr = lists_a_warp(LISTS, LANES)
    HIGH: tl.constexpr = warps_of_lists(LISTS // LOW, WARPS, LANES * LOW)
    for first_row in tl.range(
        first_list, first_list + LISTS, HIGH * LOW, num_stages=1, disable_licm=True
    ):
        row = first_row + sort_rows(HIGH, LOW)
        length = index_of(tl.load(list_ptr + 2**LOG_LIST * ROWS + row))
        lane = tl.arange(0, LANES)[None, None, :, None]
        valid = tl.arange(0, EACH)[:, None, None, None] < length - EACH * lane
        place = slot_pointers(list_ptr, first_row, ROWS, EACH, LANES, HIGH, LOW)
        entry = tl.load(place, mask=valid, other=0)
        key = ordered_pair(bits_of(entry), index_of(entry))
        key = sort_top(tl.where(valid, key, -0x8000000000000000), LOG_SIZE, LOG_TOP)
        best = (ordered(bits_of(key)).to(tl.int64) << 32) | (0x7FFFFFFF - (key & 0x7FFFFFFF))
        # All of a list is read before its start is written.
        tl.debug_barrier()
        place = slot_pointers(list_ptr, first_row, ROWS, EACH, TOP_LANES, HIGH, LOW)
        tl.store(place, best, mask=ranks(EACH, TOP_LANES) < TOP_K)


@triton.jit
def sort_narrow(
    list_ptr, first_row, TOP_K: tl.constexpr, ROWS: tl.constexpr, LOG_LIST: tl.constexpr,
    LOG_SIZE: tl.constexpr, LOG_TOP: tl.constexpr, SPECULATE: tl.constexpr, EACH: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Sort HIGH * LOW lists by narrow keys, if that is exact for all of them; whether it was."""
    LANES: tl.constexpr = 2**LOG_SIZE // EACH
    TOP_LANES: tl.constexpr = 2**LOG_TOP // EACH
    row = first_row + sort_rows(HIGH, LOW)
    head = tl.load(list_ptr + 2**LOG_LIST * ROWS + row)
    length = index_of(head)
    place = slot_pointers(list_ptr, first_row, ROWS, EACH, LANES, HIGH, LOW)
    lane = tl.arange(0, LANES)[None, None, :, None]
    mask = tl.arange(0, EACH)[:, None, None, None] < length - EACH * lane
    # The more are wanted, the further apart are their scores, so their keys need more bits.
    LOG_SHARED: tl.constexpr = 1 if LOG_TOP >= 7 else 0
    LOG_RANK: tl.constexpr = LOG_SIZE - LOG_SHARED
    key, exact = narrow_key(load_bits(place, mask), bits_of(head), LOG_SIZE, LOG_SHARED)
    exact = exact & (length <= 2**LOG_SIZE)
    if SPECULATE:
        # A key below the bound does not say where it came from.
        reach = (key != -0x80000000).to(tl.int32)
        reach = tl.sum(tl.sum(reach, 0, keep_dims=True), 2, keep_dims=True)
        exact = exact & (reach >= tl.minimum(length, TOP_K))
    all_exact = tl.min(exact.to(tl.int32)) != 0
    if all_exact:
        best_key = sort_top(key, LOG_SIZE, LOG_TOP)
        slot = narrow_rank(best_key, LOG_RANK) << LOG_SHARED
        best = tl.load((list_ptr + row) + slot * ROWS)
        if LOG_SHARED == 1:
            score = narrow_score(best_key, bits_of(head), LOG_RANK).to(tl.int32, bitcast=True)
            wrong = bits_of(best) != score
            other = tl.load((list_ptr + (row + ROWS)) + slot * ROWS, mask=wrong, other=0)
            best = tl.where(wrong, other, best)
        # All of a list is read before its start is written.
        tl.debug_barrier()
        into = slot_pointers(list_ptr, first_row, ROWS, EACH, TOP_LANES, HIGH, LOW)
        tl.store(into, best, mask=ranks(EACH, TOP_LANES) < TOP_K)
    return all_exact


@triton.constexpr_function
def most_keys(log_top):
    """The most narrow keys of a list for a thread: those that share a rank spill sooner."""
    return 32 if log_top < 7 else 16


@triton.jit
def sort_longer(
    list_ptr, first_list, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_LONG: tl.constexpr, LOG_TOP: tl.constexpr,
    SPECULATE: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Sort LISTS lists as `sort_lists` does: by narrow keys up to 2 ** LOG_LONG, else by all."""
    EACH: tl.constexpr = keys_each(LOG_TOP, most_keys(LOG_TOP), LISTS, LOG_LONG, WARPS)
    LANES: tl.constexpr = max(1, 2**LOG_LONG // EACH)
    LOW: tl.constexpr = lists_a_warp(LISTS, LANES)
    HIGH: tl.constexpr = warps_of_lists(LISTS // LOW, WARPS, LANES * LOW)
    for first_row in tl.range(
        first_list, first_list + LISTS, HIGH * LOW, num_stages=1, disable_licm=True
    ):
        done = False
        # Narrow keys of more ranks would seldom be exact.
        if LOG_LONG <= 8:
            done = sort_narrow(
                list_ptr, first_row, TOP_K, ROWS, LOG_LIST, LOG_LONG, LOG_TOP, SPECULATE, EACH,
                HIGH, LOW,
            )  # fmt: skip
        if not done:
            sort_wide(
                list_ptr, first_row, TOP_K, ROWS, WARPS, LOG_LIST, LOG_LIST, LOG_TOP, HIGH * LOW,
                8 if LOG_TOP < 7 else 16,
            )  # fmt: skip


@triton.jit
def sort_lists(
    list_ptr, longest, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_SHORT: tl.constexpr, LOG_TOP: tl.constexpr,
    SPECULATE: tl.constexpr,
):  # fmt: skip
    """Leave the TOP_K best entries of each list, the longest of which has `longest`, at its start.

    In order. TOP_K <= 2 ** LOG_TOP, LOG_SHORT <= LOG_LIST. Nearly always the lists are no longer
    than 2 ** LOG_SHORT, and their scores so near each other that an int32 orders them exactly, far
    cheaper to sort than an int64. SPECULATE: whether fewer than TOP_K may reach a list's bound.
    """
    EACH: tl.constexpr = keys_each(LOG_TOP, most_keys(LOG_TOP), ROWS, LOG_SHORT, WARPS)
    LANES: tl.constexpr = 2**LOG_SHORT // EACH
    LOW: tl.constexpr = lists_a_warp(ROWS, LANES)
    HIGH: tl.constexpr = warps_of_lists(ROWS // LOW, WARPS, LANES * LOW)
    # Of more ranks an int32 has too few bits left.
    NARROW: tl.constexpr = LOG_SHORT <= 10
    # Of many wanted some lists are long, but seldom one of those that are sorted at once.
    MANY: tl.constexpr = LOG_TOP >= 7
    for first_row in tl.range(0, ROWS, HIGH * LOW, num_stages=1, disable_licm=True):
        done = ((longest <= 2**LOG_SHORT) | MANY) & NARROW
        if NARROW:  # noqa: SIM102 (known to the compiler, unlike the next)
            if done:
                done = sort_narrow(
                    list_ptr, first_row, TOP_K, ROWS, LOG_LIST, LOG_SHORT, LOG_TOP, SPECULATE,
                    EACH, HIGH, LOW,
                )  # fmt: skip
        if MANY:  # noqa: SIM102
            # Their scores are often too far from each other.
            if not done:
                row = first_row + sort_rows(HIGH, LOW)
                length = index_of(tl.load(list_ptr + 2**LOG_LIST * ROWS + row))
                done = tl.max(length) <= 2**LOG_SHORT
                if done:
                    sort_wide(
                        list_ptr, first_row, TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP,
                        HIGH * LOW, 16,
                    )  # fmt: skip
        if not MANY or LOG_SHORT < LOG_LIST:  # noqa: SIM102
            if not done:
                sort_longer(
                    list_ptr, first_row, TOP_K, ROWS, WARPS, LOG_LIST,
                    min(LOG_LIST, LOG_SHORT + 1), LOG_TOP, SPECULATE, HIGH * LOW,
                )  # fmt: skip


@triton.constexpr_function
def rows_at_once(rows, log_top, warps):
    """How many of `rows` lists to copy at once: a thread has registers for 16 entries."""
    return max(1, min(rows, 2 ** (13 - log_top), 512 * warps // 2**log_top))


@triton.jit
def store_best(
    list_ptr, scores_ptr, slots_ptr, first, num_rows, STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Copy the TOP_K entries each list starts with: rank a of row r to first + r * STRIDE + a.

    A NaN among a row's scores came first, and makes NaN of them all.
    """
    SOME: tl.constexpr = rows_at_once(ROWS, LOG_TOP, WARPS)
    rank = tl.arange(0, 2**LOG_TOP)[None, :]
    for first_row in tl.range(0, ROWS, SOME, num_stages=1):
        row = first_row + tl.arange(0, SOME)[:, None]
        mask = (rank < TOP_K) & (row < num_rows)
        best = score_of(tl.load(list_ptr + row))
        entry = tl.load(list_ptr + rank * ROWS + row, mask=mask, other=0)
        score = tl.where(best != best, float("nan"), score_of(entry))
        place = (first + row.to(tl.int64) * STRIDE) + rank
        tl.store(scores_ptr + place, score, mask=mask)
        tl.store(slots_ptr + place, index_of(entry), mask=mask)


@triton.jit
def load_best(
    list_ptr, scores_ptr, slots_ptr, first, num_rows, STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Undo `store_best`."""
    SOME: tl.constexpr = rows_at_once(ROWS, LOG_TOP, WARPS)
    rank = tl.arange(0, 2**LOG_TOP)[None, :]
    for first_row in tl.range(0, ROWS, SOME, num_stages=1):
        row = first_row + tl.arange(0, SOME)[:, None]
        mask = (rank < TOP_K) & (row < num_rows)
        place = (first + row.to(tl.int64) * STRIDE) + rank
        score = tl.load(scores_ptr + place, mask=mask, other=0.0)
        slot = tl.load(slots_ptr + place, mask=mask, other=0)
        tl.store(list_ptr + rank * ROWS + row, entry_of(score, slot), mask=rank < TOP_K)
