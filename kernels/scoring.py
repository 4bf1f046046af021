"""Scores of a tile of keys, in thread form: the jit helpers that both lookups share.

Thread form. A tensor core leaves a row with four threads, which hold two columns in eight, and a
thread with two rows, eight apart. Where a program has twice the warps its rows need, each half of
them has half of the columns. Reshaped to [2, C, THREADS], the last axis the thread, every later
step but the sums over a row is a thread's own: nothing moves, not even for a scan or a store. Under
another layout of the scores the same code is right, if slower.
"""

import triton
import triton.language as tl


@triton.jit
def thread_form(scores, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """[ROWS, COLUMNS] -> [2, C, THREADS], of C columns a thread."""
    HALVES: tl.constexpr = THREADS // (2 * ROWS)
    x = tl.reshape(scores, [ROWS // 16, 2, 8, HALVES, COLUMNS // (8 * HALVES), 4, 2])
    x = tl.permute(x, (1, 4, 6, 3, 0, 2, 5))
    return tl.reshape(x, [2, COLUMNS // (4 * HALVES), THREADS])


@triton.jit
def thread_rows(ROWS: tl.constexpr, THREADS: tl.constexpr):
    """The row of each place in thread form, [2, THREADS]."""
    thread = tl.arange(0, THREADS)[None, :] % (2 * ROWS)
    return thread // 32 * 16 + tl.arange(0, 2)[:, None] * 8 + thread // 4 % 8


@triton.jit
def thread_columns(ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """The column of each place in thread form, [C, THREADS]."""
    C: tl.constexpr = COLUMNS * ROWS // (2 * THREADS)
    own = tl.arange(0, C)[:, None]
    thread = tl.arange(0, THREADS)[None, :]
    return thread // (2 * ROWS) * (4 * C) + own // 2 * 8 + own % 2 + thread % 4 * 2


@triton.jit
def over_row_sum(x, ROWS: tl.constexpr):
    """[2, THREADS] -> the same, each place with the sum over its row's threads."""
    HALVES: tl.constexpr = x.shape[1] // (2 * ROWS)
    total = tl.sum(tl.reshape(x, [2, HALVES, ROWS // 2, 4]), 3, keep_dims=True)
    if HALVES > 1:
        total = tl.sum(total, 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [2, HALVES, ROWS // 2, 4]), x.shape)


@triton.jit
def over_row_max(x, ROWS: tl.constexpr):
    """[2, THREADS] -> the same, each place with the maximum over its row's threads."""
    HALVES: tl.constexpr = x.shape[1] // (2 * ROWS)
    best = tl.max(tl.reshape(x, [2, HALVES, ROWS // 2, 4]), 3, keep_dims=True)
    if HALVES > 1:
        best = tl.max(best, 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(best, [2, HALVES, ROWS // 2, 4]), x.shape)


@triton.jit
def threads_before(x, ROWS: tl.constexpr):
    """[THREADS] -> the sums over the row's threads before each, and over all of them."""
    HALVES: tl.constexpr = x.shape[0] // (2 * ROWS)
    odd = tl.arange(0, 2)
    one = tl.reshape(x, [HALVES, ROWS // 2, 2, 2])
    two = tl.sum(one, 3, keep_dims=True)
    total = tl.sum(two, 2, keep_dims=True)
    before = tl.where(odd[None, None, None, :] == 1, two - one, 0)
    before += tl.where(odd[None, None, :, None] == 1, total - two, 0)
    if HALVES == 2:
        four = total
        total = tl.sum(four, 0, keep_dims=True)
        before += tl.where(odd[:, None, None, None] == 1, total - four, 0)
    total = tl.broadcast_to(total, [HALVES, ROWS // 2, 2, 2])
    return tl.reshape(before, x.shape), tl.reshape(total, x.shape)


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


@triton.constexpr_function
def tile_stages(stages, key_dim, block_d):
    """Tiles to have in shared memory at once; where they are read in parts, one, but more parts."""
    return stages if key_dim <= block_d else 1


@triton.jit
def in_tile(
    start, end, ROWS: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, FIT: tl.constexpr
):
    """Which places of the tile are of the keys start .. end, [C, THREADS]."""
    if FIT == 1:
        return thread_columns(ROWS, TILE, THREADS) >= start - tile_from(start, end, TILE, FIT)
    else:
        return thread_columns(ROWS, TILE, THREADS) < end - start


@triton.jit
def score_tile(
    query, query_ptr, query_mask, keys_ptr, keys_first, start, end, KEY_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
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
        for first in tl.range(0, KEY_DIM, BLOCK_D, num_stages=STAGES, disable_licm=True):
            keys_mask = inside
            part_mask = query_mask
            if KEY_DIM % BLOCK_D > 0:
                keys_mask &= first + d[:, None] < KEY_DIM
                part_mask &= first + d[None, :] < KEY_DIM
            place = (keys_start + column.to(tl.int64) * KEY_DIM) + (first + d)[:, None]
            keys = tl.load(keys_ptr + place, mask=keys_mask, other=0.0)
            part = tl.load(query_ptr + first, mask=part_mask, other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
                part = part.to(tl.float32)
            scores = tl.dot(part, keys, scores, input_precision=PRECISION)
    return thread_form(scores, ROWS, TILE, THREADS)
