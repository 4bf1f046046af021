"""What is sorted: a score and where it came from, in an int64 or, where that is exact, an int32.

An entry is an int64, a score's float32 bits above its key's index.
"""

import triton
import triton.language as tl


@triton.jit
def ordered(bits):
    """The int32 that orders as the float32 with these bits does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def entry_of(score, index):
    """The entry of a score and its key, which is not negative."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits.to(tl.int64) << 32) | index.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def bits_of(entry):
    """The bits of an entry's score."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def score_of(entry):
    """An entry's score."""
    return bits_of(entry).to(tl.float32, bitcast=True)


@triton.jit
def index_of(entry):
    """An entry's key."""
    return entry.to(tl.int32)


@triton.jit
def load_bits(entry_ptr, mask):
    """The bits of the scores of entries, their upper halves; -inf's where masked."""
    return tl.load(entry_ptr.to(tl.pointer_type(tl.int32)) + 1, mask=mask, other=-0x800000)


@triton.jit
def ordered_pair(bits, index):
    """The int64 that orders by score, NaN first, then by lower index."""
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, ordered(bits))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def narrow_key(bits, bound, LOG_SIZE: tl.constexpr, LOG_SHARED: tl.constexpr):
    """An int32 that orders by score, then by lower rank, and whether it does so exactly.

    bits, in sort form, of scores; bound, of which enough are above, `ordered`. The lowest bits of a
    key are its rank's, LOG_SIZE of them less LOG_SHARED, for two neighbours may share them: their
    scores say which is which. The others say how far its score is above the bound, as far as that
    fits. Scores below the bound are all one. Not exact where a score is NaN or too far above, or
    where neighbours that share a rank have the same.
    """
    EACH: tl.constexpr = bits.shape[0]
    LANES: tl.constexpr = bits.shape[2]
    LOG_RANK: tl.constexpr = LOG_SIZE - LOG_SHARED
    own = (EACH - 1 - tl.arange(0, EACH)[:, None, None, None]) >> LOG_SHARED
    lane = (EACH * (LANES - 1 - tl.arange(0, LANES)[None, None, :, None])) >> LOG_SHARED
    value = ordered(bits)
    # From the least int32 on. The order of the sums is for the sake of registers.
    key = ((value << LOG_RANK) + (lane - (bound << LOG_RANK) + -0x80000000)) ^ own
    key = tl.where(value >= bound, key, -0x80000000)
    # Compared unsigned, a difference beyond int32 is too large as well.
    above = tl.maximum(tl.max(value, 0, keep_dims=True), bound) - bound
    exact = above.to(tl.uint32, bitcast=True) < 2 ** (32 - LOG_RANK)
    # A NaN may have either sign.
    largest = tl.max(bits & 0x7FFFFFFF, 0, keep_dims=True)
    exact = exact & (largest <= 0x7F800000)
    if LOG_SHARED == 1:
        pair = tl.reshape(value, [EACH // 2, 2, bits.shape[1], LANES * bits.shape[3]])
        same = tl.where(tl.xor_sum(pair, 1) == 0, tl.max(pair, 1), -0x80000000)
        same = tl.reshape(tl.max(same, 0), [1, bits.shape[1], LANES, bits.shape[3]])
        exact = exact & (same < bound)
    return key, exact


@triton.jit
def narrow_rank(key, LOG_RANK: tl.constexpr):
    """The rank in a key of `narrow_key`; with LOG_RANK of its bits."""
    return 2**LOG_RANK - 1 - (key & (2**LOG_RANK - 1))


@triton.jit
def narrow_score(key, bound, LOG_RANK: tl.constexpr):
    """The score in a key of `narrow_key`."""
    above = (key ^ -0x80000000).to(tl.uint32, bitcast=True) >> LOG_RANK
    return ordered(above.to(tl.int32, bitcast=True) + bound).to(tl.float32, bitcast=True)
