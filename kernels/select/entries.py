"""Candidates as entries and as keys to sort by: int64, a score above an index.

An entry has the bits of its score. A sort key has them in the order of the scores, and the index
inverted, so that of equal scores the lower index comes first. NaN comes before all.
"""

import triton
import triton.language as tl


@triton.jit
def order_bits(score):
    """float32 -> int32 in the same order; both zeros alike."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_bits(bits):
    """The inverse of `order_bits`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(score, index):
    """The entry of a score and its index."""
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 32) | index.to(tl.uint32).to(tl.int64)


@triton.jit
def entry_score(entry):
    """The score of an entry."""
    return (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def sort_key(score, index):
    """The sort key of a score and its index."""
    return (order_bits(score).to(tl.int64) << 32) | (~index).to(tl.uint32).to(tl.int64)


@triton.jit
def key_score(key):
    """The score of a sort key."""
    return from_order_bits((key >> 32).to(tl.int32))


@triton.jit
def key_index(key):
    """The index of a sort key."""
    return ~key.to(tl.int32)
