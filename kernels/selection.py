"""Selection of the k best of a row of scores: the jit helpers that both lookups share.

A program owns ROWS queries and streams their scores tile by tile. What may still be among the k
best of a row is appended to the row's list, in memory that stays in cache: slot s of row r is at
list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index. A bound
of the k-th best is looked for first (see `bounds`); the lists are sorted at the end, and cut on the
way (see `lists`).
"""

import triton
import triton.language as tl

from .bounds import first_look
from .entries import score_of
from .lists import sort_lists, store_head
from .scoring import (
    in_tile,
    load_query,
    load_query_in_parts,
    score_tile,
    tile_from,
    tile_stages,
)
from .thread_form import thread_columns, thread_rows, threads_before


@triton.jit
def append_rows(scores, index, keep, count, row, list_ptr, ROWS: tl.constexpr):
    """Append scores [C, THREADS], one row a thread, where keep; count, row [THREADS]."""
    # In units of a slot's size, to spare a multiplication for each score.
    kept = tl.where(keep, ROWS, 0)
    before, total = threads_before(tl.sum(kept, 0), ROWS)
    thread_ptr = list_ptr + (count * ROWS + before + row - ROWS)
    place = thread_ptr[None, :] + tl.cumsum(kept, 0)
    place32 = place.to(tl.pointer_type(tl.int32))[:, :, None] + tl.arange(0, 2)[None, None, :]
    both = tl.join(index, scores.to(tl.int32, bitcast=True))
    tl.store(place32, both, mask=keep[:, :, None])
    return count + total // ROWS


@triton.jit
def append(
    scores, start, end, bound, count, list_ptr, ROWS: tl.constexpr, TILE: tl.constexpr,
    FIT: tl.constexpr, WITH_NAN: tl.constexpr,
):  # fmt: skip
    """Append the scores that reach their rows' bounds to the rows' lists; the new lengths.

    scores [2, C, THREADS], of the tile of keys start .. end; bound, count [2, THREADS].
    """
    THREADS: tl.constexpr = count.shape[1]
    scores_0, scores_1 = tl.split(tl.permute(scores, (1, 2, 0)))
    bound_0, bound_1 = tl.split(tl.permute(bound, (1, 0)))
    count_0, count_1 = tl.split(tl.permute(count, (1, 0)))
    row_0, row_1 = tl.split(tl.permute(thread_rows(ROWS, THREADS), (1, 0)))
    index = tile_from(start, end, TILE, FIT) + thread_columns(ROWS, TILE, THREADS)
    if WITH_NAN:
        keep_0 = ~(scores_0 < bound_0[None, :])
        keep_1 = ~(scores_1 < bound_1[None, :])
    else:
        keep_0 = scores_0 >= bound_0[None, :]
        keep_1 = scores_1 >= bound_1[None, :]
    if FIT < 2:
        keep_0 &= in_tile(start, end, ROWS, TILE, THREADS, FIT)
        keep_1 &= in_tile(start, end, ROWS, TILE, THREADS, FIT)
    count_0 = append_rows(scores_0, index, keep_0, count_0, row_0, list_ptr, ROWS)
    count_1 = append_rows(scores_1, index, keep_1, count_1, row_1, list_ptr, ROWS)
    return tl.permute(tl.join(count_0, count_1), (1, 0))


@triton.jit
def cut_lists(
    list_ptr, bound, count, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_SHORT: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Sort the lists and cut them back to the TOP_K best; the better bounds, the new lengths."""
    row = thread_rows(ROWS, 32 * WARPS)
    store_head(list_ptr, bound, count, row, ROWS, LOG_LIST)
    tl.debug_barrier()
    sort_lists(list_ptr, tl.max(count), TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP)
    tl.debug_barrier()
    last = score_of(tl.load(list_ptr + (TOP_K - 1) * ROWS + row))
    # NaN is no bound.
    bound = tl.where((count >= TOP_K) & (last > bound), last, bound)
    return bound, tl.minimum(count, TOP_K)


@triton.jit
def select(
    query_ptr, row_stride, num_rows, keys, list_ptr, first_key, end, TOP_K: tl.constexpr,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
    PARTS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr,
    GROWTH: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave the TOP_K best of keys first_key .. end, in order, at the start of each row's list.

    query_ptr: to the first row's first element; rows are row_stride apart, num_rows are real.
    keys: a tuple (see `scoring`).
    """
    LIST: tl.constexpr = 2**LOG_LIST
    LOG_SHORT: tl.constexpr = max(6, LOG_TOP + 1)
    THREADS: tl.constexpr = 32 * WARPS
    LOADED: tl.constexpr = tile_stages(STAGES, KEY_DIM, BLOCK_D)
    row_ptr = query_ptr + tl.arange(0, ROWS)[:, None].to(tl.int64) * row_stride
    if PRECISION == "float16x3":
        # The lists are still empty, but parts that are read for each tile must not be in them.
        spare_ptr = list_ptr
        if KEY_DIM > BLOCK_D:
            spare_ptr += (LIST + 1) * ROWS
        query = load_query_in_parts(row_ptr, num_rows, spare_ptr, KEY_DIM, ROWS, THREADS, BLOCK_D)
    else:
        query = load_query(row_ptr, num_rows, KEY_DIM, ROWS, BLOCK_D, UPCAST)
    bound = tl.full([2, THREADS], float("-inf"), tl.float32)
    if PARTS > 0:
        # Scoring some keys twice costs less than appending, and sorting, what a later bound would
        # have ruled out.
        bound = first_look(
            query, keys, first_key, end, TOP_K, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES,
            PARTS, SAMPLE, ROUNDS, FIT, UPCAST, PRECISION,
        )  # fmt: skip
    # Rows past the last token append nothing.
    bound = tl.where(thread_rows(ROWS, THREADS) < num_rows, bound, float("inf"))
    count = tl.zeros([2, THREADS], tl.int32)
    longest = 0
    start = first_key
    # Where lists are cut back to the best so far, for a better bound.
    cut = first_key + FIRST_CUT
    # Not a while loop: out of that, what sorting needs would be computed, and kept in registers.
    for _ in tl.range(first_key, end, TILE, num_stages=1, disable_licm=True):
        if start < end:
            # As far as no list can overflow.
            room = (LIST - longest) // TILE * TILE
            stop = tl.minimum(tl.minimum(end, cut), start + room)
            for tile_start in tl.range(start, stop, TILE, num_stages=LOADED, disable_licm=True):
                scores = score_tile(
                    query, keys, tile_start, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES,
                    FIT, UPCAST, PRECISION,
                )  # fmt: skip
                count = append(
                    scores, tile_start, end, bound, count, list_ptr, ROWS, TILE, FIT, True
                )  # fmt: skip
            start = stop
            longest = tl.max(count)
            if (start >= tl.minimum(end, cut)) | (longest > LIST - TILE):
                bound, count = cut_lists(
                    list_ptr, bound, count, TOP_K, ROWS, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP
                )  # fmt: skip
                longest = TOP_K
                cut = first_key + (start - first_key) * GROWTH // (2 * TILE) * TILE
