"""Selection of the k best of a row of scores: the jit helpers that both lookups share.

A program owns ROWS queries and streams their scores tile by tile. What may still be among the k
best of a row is appended to the row's list, in memory that stays in cache: slot s of row r is at
list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index.

    raise_bound    a lower bound of each row's k-th best, from running maxima
    append         puts what reaches the bound on the lists
    sort_lists     leaves the k best of each list, in order, at its start

Thread form. A tensor core leaves a row with four threads, which hold two columns in eight, and a
thread with two rows, eight apart. Reshaped to [2, C, THREADS], the last axis the thread, every
later step but the sums over a row is a thread's own: nothing moves, not even for a scan or a
store. Under another layout of the scores the same code is right, if slower.
"""

import triton
import triton.language as tl

from .lists import ordered, score_of, sort_lists


@triton.jit
def thread_form(scores, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> [2, COLUMNS / 4, 2 * ROWS]."""
    x = tl.reshape(scores, [ROWS // 16, 2, 8, COLUMNS // 8, 4, 2])
    return tl.reshape(tl.permute(x, (1, 3, 5, 0, 2, 4)), [2, COLUMNS // 4, 2 * ROWS])


@triton.jit
def thread_rows(ROWS: tl.constexpr):
    """The row of each place in thread form, [2, 2 * ROWS]."""
    thread = tl.arange(0, 2 * ROWS)[None, :]
    return thread // 32 * 16 + tl.arange(0, 2)[:, None] * 8 + thread // 4 % 8


@triton.jit
def thread_columns(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The column of each place in thread form, [COLUMNS / 4, 2 * ROWS]."""
    own = tl.arange(0, COLUMNS // 4)[:, None]
    return own // 2 * 8 + own % 2 + tl.arange(0, 2 * ROWS)[None, :] % 4 * 2


@triton.jit
def over_row_sum(x, ROWS: tl.constexpr):
    """[2, 2 * ROWS] -> the same, each place with the sum over its row's four threads."""
    total = tl.sum(tl.reshape(x, [2, ROWS // 2, 4]), 2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [2, ROWS // 2, 4]), [2, 2 * ROWS])


@triton.jit
def over_row_max(x, ROWS: tl.constexpr):
    """[2, 2 * ROWS] -> the same, each place with the maximum over its row's four threads."""
    best = tl.max(tl.reshape(x, [2, ROWS // 2, 4]), 2, keep_dims=True)
    return tl.reshape(tl.broadcast_to(best, [2, ROWS // 2, 4]), [2, 2 * ROWS])


@triton.jit
def threads_before(x, ROWS: tl.constexpr):
    """[2 * ROWS] -> the sums over the row's threads before each, and over all four."""
    odd = tl.arange(0, 2)
    one = tl.reshape(x, [ROWS // 2, 2, 2])
    two = tl.sum(one, 2, keep_dims=True)
    four = tl.sum(two, 1, keep_dims=True)
    before = tl.where(odd[None, None, :] == 1, two - one, 0)
    before += tl.where(odd[None, :, None] == 1, four - two, 0)
    total = tl.broadcast_to(four, [ROWS // 2, 2, 2])
    return tl.reshape(before, [2 * ROWS]), tl.reshape(total, [2 * ROWS])


@triton.jit
def raise_bound(best, bound, top_k, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """A lower bound of each row's top_k-th best: near the top_k-th largest of its maxima.

    best [2, C, 2 * ROWS], each the maximum of a group of its row's scores so far; bound
    [2, 2 * ROWS]. Bisection from below may stop anywhere, the bound holds.
    """
    pairs = tl.reshape(best, [2, best.shape[1] // 2, 2, 2 * ROWS])
    low = -over_row_max(-tl.min(tl.max(pairs, 2), 1), ROWS)
    high = tl.maximum(low, over_row_max(tl.max(tl.min(pairs, 2), 1), ROWS))
    low = ordered(low.to(tl.int32, bitcast=True))
    high = ordered(high.to(tl.int32, bitcast=True))
    for _ in tl.range(ROUNDS, num_stages=1):
        difference = low ^ high
        middle = (low & high) + (difference >> 1) + (difference & 1)
        level = ordered(middle).to(tl.float32, bitcast=True)
        count = over_row_sum(tl.sum((best >= level[:, None, :]).to(tl.int32), 1), ROWS)
        low = tl.where(count >= top_k, middle, low)
        high = tl.where(count >= top_k, high, middle - 1)
    return tl.maximum(bound, ordered(low).to(tl.float32, bitcast=True))


@triton.jit
def append_rows(scores, index, keep, count, row, list_ptr, ROWS: tl.constexpr):
    """Append scores [C, 2 * ROWS], one row a thread, where keep; count, row [2 * ROWS]."""
    # In units of a slot's size, to spare a multiplication for each score.
    kept = tl.where(keep, ROWS, 0)
    before, total = threads_before(tl.sum(kept, 0), ROWS)
    place = (count * ROWS + before + row - ROWS)[None, :] + tl.cumsum(kept, 0)
    index = index.to(tl.uint32, bitcast=True).to(tl.uint64).to(tl.int64, bitcast=True)
    entry = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | index
    tl.store(list_ptr + place, entry, mask=keep)
    return count + total // ROWS


@triton.jit
def append(
    scores, start, end, bound, count, list_ptr, ROWS: tl.constexpr, TILE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Append the scores that reach their rows' bounds to the rows' lists; the new lengths.

    scores [2, TILE / 4, 2 * ROWS], of keys start .. end; bound, count [2, 2 * ROWS].
    """
    # A quarter of a thread's scores at a time, for the sake of registers. NaN is appended, too.
    scores_0, scores_1 = tl.split(tl.permute(scores, (1, 2, 0)))
    bound_0, bound_1 = tl.split(tl.permute(bound, (1, 0)))
    count_0, count_1 = tl.split(tl.permute(count, (1, 0)))
    row_0, row_1 = tl.split(tl.permute(thread_rows(ROWS), (1, 0)))
    low = start + thread_columns(ROWS, TILE // 2)
    high = low + TILE // 2
    low_0, high_0 = tl.split(
        tl.permute(tl.reshape(scores_0, [2, TILE // 8, 2 * ROWS]), (1, 2, 0))
    )  # fmt: skip
    keep = ~(low_0 < bound_0[None, :]) & ((low < end) | EVEN)
    count_0 = append_rows(low_0, low, keep, count_0, row_0, list_ptr, ROWS)
    keep = ~(high_0 < bound_0[None, :]) & ((high < end) | EVEN)
    count_0 = append_rows(high_0, high, keep, count_0, row_0, list_ptr, ROWS)
    low_1, high_1 = tl.split(
        tl.permute(tl.reshape(scores_1, [2, TILE // 8, 2 * ROWS]), (1, 2, 0))
    )  # fmt: skip
    keep = ~(low_1 < bound_1[None, :]) & ((low < end) | EVEN)
    count_1 = append_rows(low_1, low, keep, count_1, row_1, list_ptr, ROWS)
    keep = ~(high_1 < bound_1[None, :]) & ((high < end) | EVEN)
    count_1 = append_rows(high_1, high, keep, count_1, row_1, list_ptr, ROWS)
    return tl.permute(tl.join(count_0, count_1), (1, 0))


@triton.jit
def score_tile(
    query, query_ptr, query_mask, keys_ptr, start, end, KEY_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of keys start .. start + TILE, -inf from end on, in thread form."""
    # 64 bits for where the tile starts; inside it, 32 are enough and cost half the registers.
    keys_ptr += tl.cast(start, tl.int64) * KEY_DIM
    column = tl.arange(0, TILE)[None, :]
    d = tl.arange(0, BLOCK_D)
    inside = (column < end - start) | EVEN
    if KEY_DIM <= BLOCK_D:
        mask = inside & (d[:, None] < KEY_DIM)
        keys = tl.load(keys_ptr + (column * KEY_DIM + d[:, None]), mask=mask, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, input_precision=PRECISION)
    else:
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for first in tl.range(0, KEY_DIM, BLOCK_D, num_stages=1):
            mask = inside & (first + d[:, None] < KEY_DIM)
            place = column * KEY_DIM + (first + d)[:, None]
            keys = tl.load(keys_ptr + place, mask=mask, other=0.0)
            mask = query_mask & (first + d[None, :] < KEY_DIM)
            part = tl.load(query_ptr + first, mask=mask, other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
                part = part.to(tl.float32)
            scores = tl.dot(part, keys, scores, input_precision=PRECISION)
    scores = thread_form(scores, ROWS, TILE)
    if EVEN:
        return scores
    else:
        index = start + thread_columns(ROWS, TILE)[None, :, :]
        return tl.where(index < end, scores, float("-inf"))


@triton.jit
def select(
    query_ptr, num_rows, keys_ptr, list_ptr, top_ptr, first_key, end, top_k,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, LOG_LIST: tl.constexpr, LOG_SHORT: tl.constexpr,
    LOG_TOP: tl.constexpr, FULL: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave the top_k best of keys first_key .. end of each row, in order, at top_ptr.

    query_ptr [ROWS, BLOCK_D] points to the rows' first elements, of which num_rows are real;
    keys_ptr [end, KEY_DIM].
    """
    LIST: tl.constexpr = 2**LOG_LIST
    # Rows past the last token append nothing.
    bound = tl.where(thread_rows(ROWS) < num_rows, float("-inf"), float("inf"))
    d = tl.arange(0, BLOCK_D)[None, :]
    query_mask = tl.arange(0, ROWS)[:, None] < num_rows
    query = tl.load(query_ptr, mask=query_mask & (d < KEY_DIM), other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    if 2**LOG_TOP * 2 <= TILE:
        # A first look at some keys, only for the bound: scoring them twice costs less than
        # appending, and sorting, what a later bound would have ruled out.
        best = tl.full([2, TILE // 4, 2 * ROWS], float("-inf"), tl.float32)
        for start in tl.range(
            first_key, tl.minimum(end, first_key + SAMPLE), TILE, num_stages=1, disable_licm=True
        ):
            scores = score_tile(
                query, query_ptr, query_mask, keys_ptr, start, end, KEY_DIM, ROWS, TILE, BLOCK_D,
                EVEN, UPCAST, PRECISION,
            )  # fmt: skip
            best = tl.maximum(best, scores)
        bound = raise_bound(best, bound, top_k, ROWS, ROUNDS)
    count = tl.zeros([2, 2 * ROWS], tl.int32)
    longest = 0
    start = first_key
    while start < end:
        # As far as no list can overflow.
        stop = tl.minimum(end, start + (LIST - longest) // TILE * TILE)
        for tile_start in tl.range(start, stop, TILE, num_stages=1, disable_licm=True):
            scores = score_tile(
                query, query_ptr, query_mask, keys_ptr, tile_start, end, KEY_DIM, ROWS, TILE,
                BLOCK_D, EVEN, UPCAST, PRECISION,
            )  # fmt: skip
            count = append(
                scores, tile_start, end, bound, count, list_ptr, ROWS, TILE, EVEN
            )  # fmt: skip
        start = stop
        longest = tl.max(count)
        if (start >= end) | (longest > FULL):
            head = ordered(bound.to(tl.int32, bitcast=True)).to(tl.int64) << 32
            tl.store(list_ptr + LIST * ROWS + thread_rows(ROWS), head | count.to(tl.int64))
            tl.debug_barrier()
            # Before the last key, only to make room, and for a better bound.
            into_ptr = tl.where(start < end, list_ptr, top_ptr)
            sort_lists(list_ptr, into_ptr, top_k, ROWS, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP)
            tl.debug_barrier()
            if start < end:
                last = tl.load(list_ptr + (top_k - 1) * ROWS + thread_rows(ROWS))
                bound = tl.where(count >= top_k, tl.maximum(bound, score_of(last)), bound)
                count = tl.minimum(count, top_k)
                longest = top_k
