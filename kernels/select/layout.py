"""The fragment layout of a tile of scores, in which a row's scores stay inside its threads.

A tensor core's accumulator leaves a row with four threads, which hold two columns in eight; a
thread has two rows, eight apart. Where a program has more warps than its rows need, each of them
has a part of the columns. Reshaped to [2, C, THREADS], the last axis the thread, every later step
but the sums over a row is a thread's own: nothing moves between threads, not even for a scan or a
store. With another layout of the accumulator the same code is right, if slower.
"""

import triton
import triton.language as tl


@triton.jit
def to_fragments(scores, THREADS: tl.constexpr):
    """[ROWS, COLUMNS] -> [2, C, THREADS], of C columns a thread."""
    ROWS: tl.constexpr = scores.shape[0]
    COLUMNS: tl.constexpr = scores.shape[1]
    PARTS: tl.constexpr = THREADS // (2 * ROWS)
    x = tl.reshape(scores, [ROWS // 16, 2, 8, PARTS, COLUMNS // (8 * PARTS), 4, 2])
    x = tl.permute(x, (1, 4, 6, 3, 0, 2, 5))
    return tl.reshape(x, [2, COLUMNS // (4 * PARTS), THREADS])


@triton.jit
def fragment_rows(ROWS: tl.constexpr, THREADS: tl.constexpr):
    """The row of each element of a fragment, [2, 1, THREADS]."""
    thread = tl.arange(0, THREADS)[None, None, :] % (2 * ROWS)
    return thread // 32 * 16 + tl.arange(0, 2)[:, None, None] * 8 + thread // 4 % 8


@triton.jit
def fragment_columns(start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """The column of each element of a fragment, from start on, [1, C, THREADS]."""
    C: tl.constexpr = COLUMNS * ROWS // (2 * THREADS)
    own = tl.arange(0, C)[None, :, None]
    thread = tl.arange(0, THREADS)[None, None, :]
    # What a thread's columns share is summed first, or a loop keeps a register for each of them.
    return (start + thread // (2 * ROWS) * (4 * C) + thread % 4 * 2) + (own // 2 * 8 + own % 2)


@triton.jit
def _row_first(x, ROWS: tl.constexpr):
    """[2, THREADS] -> [2, PARTS, ROWS / 2, 4]: a row's threads are axes 1 and 3."""
    return tl.reshape(x, [2, x.shape[1] // (2 * ROWS), ROWS // 2, 4])


@triton.jit
def row_sum(x, ROWS: tl.constexpr):
    """[2, THREADS] -> the same, each element the sum over its row's threads."""
    y = _row_first(x, ROWS)
    total = tl.sum(tl.sum(y, 3, keep_dims=True), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, y.shape), x.shape)


@triton.jit
def row_max(x, ROWS: tl.constexpr):
    """[2, THREADS] -> the same, each element the maximum over its row's threads."""
    y = _row_first(x, ROWS)
    most = tl.max(tl.max(y, 3, keep_dims=True), 1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(most, y.shape), x.shape)


@triton.jit
def row_prefix(x, ROWS: tl.constexpr):
    """[2, THREADS] -> the sums over the row's threads before each, and over all of them."""
    PARTS: tl.constexpr = x.shape[1] // (2 * ROWS)
    odd = tl.arange(0, 2)
    one = tl.reshape(x, [2, PARTS, ROWS // 2, 2, 2])
    two = tl.sum(one, 4, keep_dims=True)
    four = tl.sum(two, 3, keep_dims=True)
    before = tl.where(odd[None, None, None, None, :] == 1, two - one, 0)
    before += tl.where(odd[None, None, None, :, None] == 1, four - two, 0)
    total = four
    if PARTS > 1:
        total = tl.sum(four, 1, keep_dims=True)
        before += tl.cumsum(four, 1) - four
    total = tl.broadcast_to(total, one.shape)
    return tl.reshape(before, x.shape), tl.reshape(total, x.shape)
