"""Selection of the k best of a row of scores: the jit helpers that both lookups share.

A program owns ROWS queries and streams their scores tile by tile. What may still be among the k
best of a row is appended to the row's list, in memory that stays in cache: slot s of row r is at
list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index. A bound
of the k-th best is looked for first (see `bounds`); the lists are sorted at the end, and cut on the
way (see `lists`).

Of a few among many keys a bound that is sure comes late. There bounds are speculative at first:
scores that, going by the keys seen, k of all keys most likely reach. If in the end they do not, in
some row, the keys are gone through again, with bounds that are sure.
"""

import triton
import triton.language as tl

from .appending import append
from .assembly import opaque
from .bounds import first_look, likely_enough, raise_bound
from .entries import score_of
from .lists import sort_lists, store_head
from .scoring import load_query, load_query_in_parts, score_tile, tile_stages
from .thread_form import thread_rows


@triton.jit
def cut_lists(
    list_ptr, bound, count, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_SHORT: tl.constexpr, LOG_TOP: tl.constexpr,
    SPECULATE: tl.constexpr,
):  # fmt: skip
    """Sort the lists and cut them back to the TOP_K best; the better bounds, the new lengths.

    And which lists fell short: those without TOP_K entries that reach the bound they had.
    """
    row = thread_rows(ROWS, 32 * WARPS)
    store_head(list_ptr, bound, count, row, ROWS, LOG_LIST)
    tl.debug_barrier()
    sort_lists(list_ptr, tl.max(count), TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP, SPECULATE)
    tl.debug_barrier()
    last = score_of(tl.load(list_ptr + (TOP_K - 1) * ROWS + row))
    # NaN is no bound.
    short = (count < TOP_K) | (last < bound)
    bound = tl.where((count >= TOP_K) & (last > bound), last, bound)
    return bound, tl.minimum(count, TOP_K), short


@triton.jit
def go_through(
    query, keys, num_rows, sure, list_ptr, first_key, end, stride, TOP_K: tl.constexpr,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
    SETS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr,
    GROWTH: tl.constexpr, SPECULATE: tl.constexpr, SPREAD: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`select` of loaded queries; whether some list fell short, as only speculative bounds let it.

    sure: whether no bound may be speculative.
    """
    LIST: tl.constexpr = 2**LOG_LIST
    LOG_SHORT: tl.constexpr = max(6, LOG_TOP + (2 if SPECULATE else 1))
    # The first look is in short tiles, for its maxima take registers.
    LOOK: tl.constexpr = min(TILE, 64)
    THREADS: tl.constexpr = 32 * WARPS
    LOADED: tl.constexpr = tile_stages(STAGES, KEY_DIM, BLOCK_D)
    bound = tl.full([2, THREADS], float("-inf"), tl.float32)
    if SETS > 0:
        # Scoring some keys twice costs less than appending, and sorting, what a later bound would
        # have ruled out.
        least = TOP_K
        if SPECULATE:
            least = tl.where(sure, TOP_K, likely_enough(TOP_K, SAMPLE, end - first_key))
        bound = first_look(
            query, keys, first_key, end, least, TOP_K, KEY_DIM, ROWS, LOOK, THREADS, BLOCK_D,
            STAGES, SETS, SAMPLE, ROUNDS, SPREAD, FIT, UPCAST, PRECISION,
        )  # fmt: skip
    # Rows past the last token append nothing.
    bound = tl.where(thread_rows(ROWS, THREADS) < num_rows, bound, float("inf"))
    count = tl.zeros([2, THREADS], tl.int32)
    longest = 0
    start = first_key
    fell_short = False
    # The tiles so far are to be spread over all, however scores drift from the first key to the
    # last; and begin in the middle, for at an end are the best of keys in order of their scores.
    past = end if FIT == 2 else first_key + tl.cdiv(end - first_key, TILE) * TILE
    place = first_key + (past - first_key) // (2 * TILE) * TILE
    # Where lists are cut back to the best so far, or only looked at, for a better bound.
    cut = first_key + FIRST_CUT
    # Not a while loop: out of that, what sorting needs would be computed, and kept in registers.
    for _ in tl.range(0, tl.cdiv(end - first_key, TILE), num_stages=1, disable_licm=True):
        if start < end:
            # As far as no list can overflow.
            room = (LIST - longest) // TILE * TILE
            stop = tl.minimum(tl.minimum(end, cut), start + room)
            for tile_start in tl.range(start, stop, TILE, num_stages=LOADED, disable_licm=True):
                if not SPREAD:
                    place = tile_start
                scores = score_tile(
                    query, keys, place, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES, FIT,
                    UPCAST, PRECISION,
                )  # fmt: skip
                count = append(scores, place, end, bound, count, list_ptr, ROWS, TILE, FIT, True)
                if SPREAD:
                    place += stride
                    place = tl.where(place < past, place, place - (past - first_key))
            start = stop
            longest = tl.max(count)
            if SPECULATE:
                if (start >= end) | (longest > LIST - TILE):
                    bound, count, short = cut_lists(
                        opaque(list_ptr), bound, count, TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT,
                        LOG_TOP, SPECULATE,
                    )  # fmt: skip
                    longest = TOP_K
                    # Just cut, so not looked at before the next tile.
                    cut = tl.maximum(cut, start + TILE)
                    # What counts is the last of these, when all keys were seen.
                    short &= thread_rows(ROWS, THREADS) < num_rows
                    fell_short = tl.max(short.to(tl.int32)) > 0
                elif start >= cut:
                    seen = start - first_key
                    least = tl.where(sure, TOP_K, likely_enough(TOP_K, seen, end - first_key))
                    tl.debug_barrier()
                    bound = raise_bound(
                        opaque(list_ptr), bound, count, least, ROWS, THREADS, ROUNDS
                    )
                    cut = first_key + seen * GROWTH // (2 * TILE) * TILE
            else:
                if (start >= tl.minimum(end, cut)) | (longest > LIST - TILE):
                    bound, count, _short = cut_lists(
                        opaque(list_ptr), bound, count, TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT,
                        LOG_TOP, SPECULATE,
                    )  # fmt: skip
                    longest = TOP_K
                    cut = first_key + (start - first_key) * GROWTH // (2 * TILE) * TILE
    return fell_short


@triton.jit
def select(
    query_ptr, row_stride, num_rows, keys, list_ptr, first_key, end, stride, TOP_K: tl.constexpr,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
    SETS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr,
    GROWTH: tl.constexpr, SPECULATE: tl.constexpr, SPREAD: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave the TOP_K best of keys first_key .. end, in order, at the start of each row's list.

    query_ptr: to the first row's first element; rows are row_stride apart, num_rows are real.
    keys: a tuple (see `scoring`).
    """
    THREADS: tl.constexpr = 32 * WARPS
    row_ptr = query_ptr + tl.arange(0, ROWS)[:, None].to(tl.int64) * row_stride
    if PRECISION == "float16x3":
        # The lists are still empty, but parts that are read for each tile must not be in them.
        spare_ptr = list_ptr
        if KEY_DIM > BLOCK_D:
            spare_ptr += (2**LOG_LIST + 1) * ROWS
        query = load_query_in_parts(row_ptr, num_rows, spare_ptr, KEY_DIM, ROWS, THREADS, BLOCK_D)
    else:
        query = load_query(row_ptr, num_rows, KEY_DIM, ROWS, BLOCK_D, UPCAST)
    if SPECULATE:
        again = True
        for turn in tl.range(2, num_stages=1, disable_licm=True):
            if again:
                again = go_through(
                    query, keys, num_rows, turn > 0, list_ptr, first_key, end, stride, TOP_K,
                    KEY_DIM, ROWS, TILE, BLOCK_D, WARPS, STAGES, LOG_LIST, LOG_TOP, SETS, SAMPLE,
                    ROUNDS, FIRST_CUT, GROWTH, SPECULATE, SPREAD, FIT, UPCAST, PRECISION,
                )  # fmt: skip
    else:
        go_through(
            query, keys, num_rows, True, list_ptr, first_key, end, stride, TOP_K, KEY_DIM, ROWS,
            TILE, BLOCK_D, WARPS, STAGES, LOG_LIST, LOG_TOP, SETS, SAMPLE, ROUNDS, FIRST_CUT,
            GROWTH, SPECULATE, SPREAD, FIT, UPCAST, PRECISION,
        )  # fmt: skip
