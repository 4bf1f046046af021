"""Rounding float32 to half precision at random, unbiased."""

import triton
import triton.language as tl


@triton.jit
def round_stochastically(x, random, dtype: tl.constexpr):
    """float32 to one of its two neighbours in bfloat16 or float16, unbiased.

    `random` is uint32. Added below the last bit that is kept, it carries as often as it should.
    What is rounded to beyond the largest number becomes infinite, as in torch's own conversion.
    """
    bits = x.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        mask = tl.full(x.shape, 0xFFFF, tl.int32)
    else:
        # Below 2 ** -14 the spacing of float16 stays 2 ** -24: of the 24 bits more are dropped.
        exponent = (bits >> 23) & 0xFF
        dropped = tl.minimum(13 + tl.maximum(113 - exponent, 0), 31)
        mask = (tl.full(x.shape, 1, tl.int32) << tl.minimum(dropped, 23)) - 1
    added = (bits + (random.to(tl.int32, bitcast=True) & mask)) & ~mask
    rounded = added.to(tl.float32, bitcast=True)
    if dtype != tl.bfloat16:
        # Less than one spacing: up to it with the probability x / 2 ** -24, else to zero.
        chance = (random >> 8).to(tl.float32) * 2.0**-24
        up = tl.where(chance < tl.abs(x) * 2.0**24, 2.0**-24, 0.0)
        rounded = tl.where(tl.abs(x) < 2.0**-24, tl.where(x < 0, -up, up), rounded)
        infinity = tl.where(x < 0, float("-inf"), float("inf"))
        rounded = tl.where(tl.abs(rounded) > 65504.0, infinity, rounded)
    # Infinity and NaN stay as they are.
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded).to(dtype)


@triton.jit
def rounded_at(value, place, seed, step, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Values in the dtype of the table whose elements at `place` they become.

    The random numbers are counted by element and step, so that a run repeats to the bit.
    """
    if STOCHASTIC:
        low = (place & 0xFFFFFFFF).to(tl.uint32)
        high = (place >> 32).to(tl.uint32)
        count = tl.zeros_like(low) + step
        random, _, _, _ = tl.philox(seed, low, high, count.to(tl.uint32), tl.zeros_like(low))
        rounded = round_stochastically(value, random, dtype)
    else:
        rounded = value.to(dtype)
    return rounded
