"""Tiles of the sparse matrix of the scores' gradient, for the gradients of the product-key top-k.

S, [T, N] for a head and half, has the scores' gradient at the sub-keys that a token's reads chose,
and their sum at a sub-key of several reads. A kernel brings each 32 reads of a query into lists, in
one half:

    values [32]    the sums, in order of sub-keys
    words [N / 16] which of 16 sub-keys were read, a bit each; above the bits, how many values come
                   before those of the word

A tile of S is then made in registers, wherever a product wants one: the bits below a sub-key's tell
which of the values is its own, and the lanes of a warp, which hold the values of a row, shuffle it.
"""

import triton
import triton.language as tl

from .sorting import ranks, sort_rows, sort_top

# The most groups of 32 reads over which to unroll the making of a tile.
UNROLLED = tl.constexpr(4)


@triton.jit
def subkey_of(slot, half, N: tl.constexpr):
    """The sub-key of a slot in one half, -1 for a slot that is none."""
    subkey = tl.where(half == 0, slot // N, slot % N)
    return tl.where((slot >= 0) & (slot < N * N), subkey, -1)


@triton.jit
def popcount(x):
    """How many bits are set: written so that the compiler knows it for the instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def round_to_tf32(x):
    """To the 10 bits of tf32, which a product would otherwise cut off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def join(first, last, total, bits, count, first_right, last_right, total_right, bits_right, more):
    """Two runs of sorted reads, joined.

    Of a run: its first and last sub-key, the last's sum, the bits of the last's word, and how many
    sub-keys there are.
    """
    total_right += tl.where(last == last_right, total, 0.0)
    bits_right |= tl.where(last >> 4 == last_right >> 4, bits, 0)
    count += tl.where(last == first_right, more - 1, more)
    return first, last_right, total_right, bits_right, count


@triton.jit(do_not_specialize=["num_queries"])
def compress_reads_kernel(
    grad_scores_ptr,  # [T · H, k]
    slots_ptr,  # [T · H, k]
    values_ptr,  # [2, T · H, GROUPS, 32]
    words_ptr,  # [2, T · H, GROUPS, WORDS]
    num_queries,
    K: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, EACH: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A program owns 32 reads each of ROWS queries, in one half; EACH: of the form of `sorting`."""
    half = tl.program_id(1)
    group = tl.program_id(2)
    start = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.minimum(num_queries - start, ROWS).to(tl.int32)
    slots_ptr += start * K + group * 32
    grad_scores_ptr += start * K + group * 32
    line = (half * tl.cast(num_queries, tl.int64) + start) * GROUPS + group
    values_ptr += line * 32
    words_ptr += line * WORDS
    # Clear the words: those with a sub-key are stored below, after a barrier.
    row = tl.arange(0, ROWS)[:, None]
    for first in tl.range(0, WORDS, BLOCK_W, num_stages=1):
        word = first + tl.arange(0, BLOCK_W)[None, :]
        zeros = tl.zeros([ROWS, BLOCK_W], tl.int32)
        mask = (row < rows) & (word < WORDS)
        tl.store(words_ptr + row * (GROUPS * WORDS) + word, zeros, mask=mask)
    # Sort by sub-key, then by read. Of a query all 32 reads lie in one thread.
    own = ranks(EACH, 32 // EACH)
    query = sort_rows(1, ROWS)
    mask = (query < rows) & (own < K - group * 32)
    subkey = subkey_of(tl.load(slots_ptr + query * K + own, mask=mask, other=-1), half, N)
    key = tl.where(subkey >= 0, ~(subkey * 32 + own), -1 << 31)
    key = tl.permute(sort_top(key, 5, 5), (2, 0, 1, 3))
    key = ~tl.reshape(key, [32, ROWS])
    subkey = key >> 5
    place = tl.reshape(query, [1, ROWS]) * K + (key & 31)
    grad = tl.load(grad_scores_ptr + place, mask=subkey < N, other=0.0).to(tl.float32)
    one = tl.full([32, ROWS], 1, tl.int32)
    each = (subkey, subkey, grad, one << (subkey & 15), one)
    _, _, total, bits, count = tl.associative_scan(each, 0, join)
    if ROUND:
        total = round_to_tf32(total)
    # What is stored in neighbouring places goes to neighbouring threads.
    word = tl.trans(bits | (count - popcount(bits)) << 16)
    total = tl.trans(total.to(values_ptr.dtype.element_ty))
    count = tl.trans(count)
    subkey = tl.trans(subkey)
    own = tl.arange(0, 32)[None, :]
    after = tl.gather(subkey, tl.broadcast_to(tl.minimum(own + 1, 31), [ROWS, 32]), 1)
    after = tl.where(own == 31, -1, after)
    mask = (subkey < N) & (subkey != after)
    tl.store(values_ptr + row * (GROUPS * 32) + count - 1, total, mask=mask)
    mask = (subkey < N) & (subkey >> 4 != after >> 4)
    tl.debug_barrier()
    tl.store(words_ptr + row * (GROUPS * WORDS) + (subkey >> 4), word, mask=mask)


@triton.jit
def tile_columns(WIDTH: tl.constexpr):
    """Which sub-key each of the WIDTH columns of a tile is for, [WIDTH]; a product may take any.

    Neighbouring columns are a lane's, and so are neighbouring words.
    """
    RUNS: tl.constexpr = WIDTH // 32
    lane = tl.arange(0, WIDTH) // RUNS
    return (lane // 16 * RUNS + tl.arange(0, WIDTH) % RUNS) * 16 + lane % 16


@triton.jit
def make_part(values_ptr, words_ptr, line, inside, words, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's part from one group of reads, from the lists at `line` [ROWS, 1]."""
    ROWS: tl.constexpr = line.shape[0]
    RUNS: tl.constexpr = WIDTH // 32
    lane = tl.arange(0, 32)[None, :]
    values = tl.load(values_ptr + (line * 32 + lane), mask=inside, other=0.0)
    values = tl.broadcast_to(values[:, None, :], [ROWS, RUNS, 32])
    place = tl.arange(0, WIDTH // 16)[None, :]
    mask = inside & (place < words)
    word = tl.load(words_ptr + (line * WORDS + place), mask=mask, other=0)
    word = tl.broadcast_to(tl.reshape(word, [ROWS, 2, RUNS, 1]), [ROWS, 2, RUNS, 16])
    word = tl.reshape(tl.permute(word, (0, 2, 1, 3)), [ROWS, RUNS, 32])
    bit = 1 << (lane % 16)[:, None, :]
    # A sub-key that was not read may count past the last of the values.
    rank = ((word >> 16) + popcount(word & (bit - 1))) & 31
    part = tl.reshape(tl.permute(tl.gather(values, rank, 2), (0, 2, 1)), [ROWS, WIDTH])
    read = tl.reshape(tl.permute(word & bit, (0, 2, 1)), [ROWS, WIDTH])
    return tl.where(read != 0, part, 0.0)


@triton.jit
def make_tile(
    values_ptr, words_ptr, line, inside, first, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    WIDTH: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The tile of S of some queries and of WIDTH sub-keys from `first` on, in their columns' order.

    The lists of a query are at line [ROWS, 1] and after; 32 bits must do for their offsets.
    """
    words_ptr += first // 16
    words = WORDS - first // 16
    if GROUPS == 1:
        return make_part(values_ptr, words_ptr, line, inside, words, WORDS, WIDTH)
    tile = tl.zeros([line.shape[0], WIDTH], tl.float32)
    if GROUPS <= UNROLLED:
        for group in tl.static_range(GROUPS):
            part = make_part(values_ptr, words_ptr, line + group, inside, words, WORDS, WIDTH)
            tile += part.to(tl.float32)
    else:
        for group in tl.range(GROUPS, num_stages=1):
            part = make_part(values_ptr, words_ptr, line + group, inside, words, WORDS, WIDTH)
            tile += part.to(tl.float32)
    if ROUND:
        tile = round_to_tf32(tile)
    return tile.to(values_ptr.dtype.element_ty)
