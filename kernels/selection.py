"""Selection of the k best of a row of scores: the jit helpers that both lookups share.

A program owns ROWS queries and streams their scores tile by tile. What may still be among the k
best of a row is appended to the row's list, in memory that stays in cache: slot s of row r is at
list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index.

    first_look     a lower bound of each row's k-th best, from the maxima of groups of scores
    append         puts what reaches the bound on the lists
    sort_lists     leaves the k best of each list, in order, at its start

Thread form. A tensor core leaves a row with four threads, which hold two columns in eight, and a
thread with two rows, eight apart. Reshaped to [2, C, THREADS], the last axis the thread, every
later step but the sums over a row is a thread's own: nothing moves, not even for a scan or a
store. Under another layout of the scores the same code is right, if slower.
"""

import triton
import triton.language as tl

from .lists import ordered, score_of, sort_lists, store_head


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
def pack_maxima(best):
    """Two maxima in an int32, [2, C, 2 * ROWS] -> [2, C / 2, 2 * ROWS], to spare registers.

    Each keeps the upper half of its `ordered` bits: it is rounded down, as a bound may be.
    """
    C: tl.constexpr = best.shape[1]
    bits = ordered(best.to(tl.int32, bitcast=True))
    halves = tl.permute(tl.reshape(bits, [2, 2, C // 2, best.shape[2]]), (0, 2, 3, 1))
    upper, lower = tl.split(halves)
    return (upper & -0x10000) | ((lower >> 16) & 0xFFFF)


@triton.jit
def count_bound(packed, LEAST: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """A score that at least LEAST of each row's maxima reach, and few more; [2, 2 * ROWS].

    packed [2, C, 2 * ROWS], each two maxima (see `pack_maxima`); LEAST <= 4 * C. Bisection from
    below may stop anywhere, the bound holds.
    """
    upper = packed & -0x10000
    lower = packed << 16
    low = ordered(tl.min(tl.maximum(upper, lower), 1)).to(tl.float32, bitcast=True)
    high = ordered(tl.max(tl.minimum(upper, lower), 1)).to(tl.float32, bitcast=True)
    # NaN of a score, or of -inf rounded down.
    low = -over_row_max(-tl.where(low == low, low, float("-inf")), ROWS)
    high = tl.maximum(low, over_row_max(tl.where(high == high, high, float("inf")), ROWS))
    for _ in tl.range(ROUNDS, num_stages=1):
        level = 0.5 * tl.maximum(low, -3e38) + 0.5 * tl.minimum(high, 3e38)
        level = ordered(level.to(tl.int32, bitcast=True)) & -0x10000
        count = (packed >= level[:, None, :]).to(tl.int32)
        count += ((packed << 16) >= level[:, None, :]).to(tl.int32)
        enough = over_row_sum(tl.sum(count, 1), ROWS) >= LEAST
        level = ordered(level).to(tl.float32, bitcast=True)
        low = tl.where(enough, tl.maximum(low, level), low)
        high = tl.where(enough, high, level)
    return low


@triton.jit
def tile_from(start, end, TILE: tl.constexpr, FIT: tl.constexpr):
    """Where the tile of the keys from start on begins: the last one ends with the last key.

    So no load needs a mask, but for keys fewer than a tile. FIT is 0 for those, 1 for more of
    them, and 2 for as many as fill tiles.
    """
    if FIT == 1:
        return tl.minimum(start, end - TILE)
    else:
        return start


@triton.jit
def in_tile(start, end, ROWS: tl.constexpr, TILE: tl.constexpr, FIT: tl.constexpr):
    """Which places of the tile are of the keys start .. end, [TILE / 4, 2 * ROWS]."""
    if FIT == 1:
        return thread_columns(ROWS, TILE) >= start - tile_from(start, end, TILE, FIT)
    else:
        return thread_columns(ROWS, TILE) < end - start


@triton.jit
def append_rows(scores, index, keep, count, row, list_ptr, ROWS: tl.constexpr):
    """Append scores [C, 2 * ROWS], one row a thread, where keep; count, row [2 * ROWS]."""
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
    FIT: tl.constexpr,
):  # fmt: skip
    """Append the scores that reach their rows' bounds to the rows' lists; the new lengths.

    scores [2, TILE / 4, 2 * ROWS], of the tile of keys start .. end; bound, count [2, 2 * ROWS].
    """
    scores_0, scores_1 = tl.split(tl.permute(scores, (1, 2, 0)))
    bound_0, bound_1 = tl.split(tl.permute(bound, (1, 0)))
    count_0, count_1 = tl.split(tl.permute(count, (1, 0)))
    row_0, row_1 = tl.split(tl.permute(thread_rows(ROWS), (1, 0)))
    index = tile_from(start, end, TILE, FIT) + thread_columns(ROWS, TILE)
    # NaN is appended, too.
    keep_0 = ~(scores_0 < bound_0[None, :])
    keep_1 = ~(scores_1 < bound_1[None, :])
    if FIT < 2:
        keep_0 &= in_tile(start, end, ROWS, TILE, FIT)
        keep_1 &= in_tile(start, end, ROWS, TILE, FIT)
    count_0 = append_rows(scores_0, index, keep_0, count_0, row_0, list_ptr, ROWS)
    count_1 = append_rows(scores_1, index, keep_1, count_1, row_1, list_ptr, ROWS)
    return tl.permute(tl.join(count_0, count_1), (1, 0))


@triton.jit
def score_tile(
    query, query_ptr, query_mask, keys_ptr, keys_first, start, end, KEY_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the tile of keys start .. end (see `tile_from`), in thread form."""
    start = tile_from(start, end, TILE, FIT)
    # 64 bits for where the tile starts; inside it, 32 are enough and cost half the registers.
    keys_start = keys_first + tl.cast(start, tl.int64) * KEY_DIM
    column = tl.arange(0, TILE)[None, :]
    d = tl.arange(0, BLOCK_D)
    inside = (column < end - start) | (FIT > 0)
    if KEY_DIM <= BLOCK_D:
        mask = inside & (d[:, None] < KEY_DIM)
        keys = tl.load(
            keys_ptr + ((keys_start + column.to(tl.int64) * KEY_DIM) + d[:, None]),
            mask=mask,
            other=0.0,
        )
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, input_precision=PRECISION)
    else:
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for first in tl.range(0, KEY_DIM, BLOCK_D, num_stages=1):
            mask = inside & (first + d[:, None] < KEY_DIM)
            place = (keys_start + column.to(tl.int64) * KEY_DIM) + (first + d)[:, None]
            keys = tl.load(keys_ptr + place, mask=mask, other=0.0)
            mask = query_mask & (first + d[None, :] < KEY_DIM)
            part = tl.load(query_ptr + first, mask=mask, other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
                part = part.to(tl.float32)
            scores = tl.dot(part, keys, scores, input_precision=PRECISION)
    return thread_form(scores, ROWS, TILE)


@triton.jit
def tile_maxima(
    query, query_ptr, query_mask, keys_ptr, keys_first, first_key, end, KEY_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The maxima, packed, of TILE groups of keys: those of a tile every STEP keys."""
    best = tl.full([2, TILE // 4, 2 * ROWS], float("-inf"), tl.float32)
    for start in tl.range(first_key, end, STEP, num_stages=STAGES, disable_licm=True):
        scores = score_tile(
            query, query_ptr, query_mask, keys_ptr, keys_first, start, end, KEY_DIM, ROWS, TILE,
            BLOCK_D, FIT, UPCAST, PRECISION,
        )  # fmt: skip
        if FIT < 2:  # noqa: SIM102 (known to the compiler, unlike the next)
            if start + TILE > end:
                inside = in_tile(start, end, ROWS, TILE, FIT)[None, :, :]
                scores = tl.where(inside, scores, float("-inf"))
        best = tl.maximum(best, scores)
    return pack_maxima(best)


@triton.jit
def first_look(
    query, query_ptr, query_mask, keys_ptr, keys_first, first_key, end, TOP_K: tl.constexpr,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PARTS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr,
    FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A score that at least TOP_K of the first SAMPLE keys reach, in each row; [2, 2 * ROWS].

    Each of PARTS parts of the keys has at least its share of them.
    """
    LEAST: tl.constexpr = (TOP_K + PARTS - 1) // PARTS
    end = tl.minimum(end, first_key + SAMPLE)
    bound = tl.full([2, 2 * ROWS], float("inf"), tl.float32)
    for part in tl.static_range(PARTS):
        packed = tile_maxima(
            query, query_ptr, query_mask, keys_ptr, keys_first, first_key + part * TILE, end,
            KEY_DIM, ROWS, TILE, BLOCK_D, PARTS * TILE, STAGES, FIT, UPCAST, PRECISION,
        )  # fmt: skip
        bound = tl.minimum(bound, count_bound(packed, LEAST, ROWS, ROUNDS))
    return bound


@triton.jit
def select(
    query_ptr, num_rows, keys_ptr, keys_first, list_ptr, first_key, end, TOP_K: tl.constexpr,
    KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
    PARTS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr,
    GROWTH: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Leave the TOP_K best of keys first_key .. end, in order, at the start of each row's list.

    query_ptr [ROWS, BLOCK_D] points to the rows' first elements, of which num_rows are real;
    keys_ptr [end, KEY_DIM].
    """
    LIST: tl.constexpr = 2**LOG_LIST
    # Rows past the last token append nothing.
    bound = tl.where(thread_rows(ROWS) < num_rows, float("-inf"), float("inf"))
    d = tl.arange(0, BLOCK_D)[None, :]
    query_mask = tl.arange(0, ROWS)[:, None] < num_rows
    # What does not fit is read tile by tile instead.
    query_inside = query_mask & (d < KEY_DIM) & (KEY_DIM <= BLOCK_D)
    query = tl.load(query_ptr, mask=query_inside, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    if PARTS > 0:
        # Scoring some keys twice costs less than appending, and sorting, what a later bound would
        # have ruled out.
        look = first_look(
            query, query_ptr, query_mask, keys_ptr, keys_first, first_key, end, TOP_K, KEY_DIM,
            ROWS, TILE, BLOCK_D, STAGES, PARTS, SAMPLE, ROUNDS, FIT, UPCAST, PRECISION,
        )  # fmt: skip
        bound = tl.maximum(bound, look)
    count = tl.zeros([2, 2 * ROWS], tl.int32)
    longest = 0
    start = first_key
    # Where lists are cut back to the best so far, for a better bound.
    cut = first_key + FIRST_CUT
    while start < end:
        # As far as no list can overflow.
        room = (LIST - longest) // TILE * TILE
        stop = tl.minimum(tl.minimum(end, cut), start + room)
        for tile_start in tl.range(start, stop, TILE, num_stages=STAGES, disable_licm=True):
            scores = score_tile(
                query, query_ptr, query_mask, keys_ptr, keys_first, tile_start, end, KEY_DIM, ROWS,
                TILE, BLOCK_D, FIT, UPCAST, PRECISION,
            )  # fmt: skip
            count = append(
                scores, tile_start, end, bound, count, list_ptr, ROWS, TILE, FIT
            )  # fmt: skip
        start = stop
        longest = tl.max(count)
        if (start >= tl.minimum(end, cut)) | (longest > LIST - TILE):
            store_head(list_ptr, bound, count, thread_rows(ROWS), ROWS, LOG_LIST)
            tl.debug_barrier()
            sort_lists(list_ptr, longest, TOP_K, ROWS, WARPS, LOG_LIST, LOG_TOP)
            tl.debug_barrier()
            if start < end:
                last = tl.load(list_ptr + (TOP_K - 1) * ROWS + thread_rows(ROWS))
                bound = tl.where(count >= TOP_K, tl.maximum(bound, score_of(last)), bound)
                count = tl.minimum(count, TOP_K)
                longest = TOP_K
                cut = first_key + (start - first_key) * GROWTH // (2 * TILE) * TILE
