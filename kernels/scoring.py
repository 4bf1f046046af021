"""Scores of a tile of keys, in thread form: the jit helpers that both lookups share.

Thread form. A tensor core leaves a row with four threads, which hold two columns in eight, and a
thread with two rows, eight apart. Reshaped to [2, C, THREADS], the last axis the thread, every
later step but the sums over a row is a thread's own: nothing moves, not even for a scan or a
store. Under another layout of the scores the same code is right, if slower.
"""

import triton
import triton.language as tl


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
