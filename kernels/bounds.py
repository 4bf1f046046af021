"""A bound of each row's k-th best score, from the maxima of groups of scores, or from its list.

Scores are in thread form (see `thread_form`).
"""

import triton
import triton.language as tl

from .assembly import for_nvidia, reaches
from .entries import load_bits
from .scoring import in_tile, score_tile, tile_stages
from .thread_form import over_row_max, over_row_sum, thread_columns, thread_rows


@triton.jit
def pack_maxima(best):
    """Two maxima in an int32, [2, C, THREADS] -> [2, C / 2, THREADS], to spare registers.

    Each keeps the upper half of its bits: it is rounded down, as a bound may be. None is NaN.
    """
    C: tl.constexpr = best.shape[1]
    if not for_nvidia():
        # The interpreter of Triton 3.6 makes a maximum NaN if any score is.
        best = tl.where(best == best, best, float("-inf"))
    bits = best.to(tl.int32, bitcast=True)
    # Away from zero where it is negative.
    bits += (bits >> 31) & 0xFFFF
    halves = tl.permute(tl.reshape(bits, [2, 2, C // 2, best.shape[2]]), (0, 2, 3, 1))
    upper, lower = tl.split(halves)
    return (upper & -0x10000) | ((lower >> 16) & 0xFFFF)


@triton.jit
def bisect(packed, low, high, least, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """A score from low to high that at least `least` of each row's maxima reach, or low.

    packed [2, C, THREADS], each two maxima (see `pack_maxima`). It may stop anywhere, the bound
    holds.
    """
    for _ in tl.range(ROUNDS, num_stages=1):
        level = 0.5 * tl.maximum(low, -3e38) + 0.5 * tl.minimum(high, 3e38)
        # So that the bits of the lower maximum make no difference to the upper.
        level = (level.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        upper = reaches(packed.to(tl.float32, bitcast=True), level[:, None, :], False)
        lower = reaches((packed << 16).to(tl.float32, bitcast=True), level[:, None, :], False)
        enough = over_row_sum(tl.sum(upper + lower, 1), ROWS) >= least
        low = tl.where(enough, tl.maximum(low, level), low)
        high = tl.where(enough, high, level)
    return low


@triton.jit
def count_bound(packed, least, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """A score that at least `least` of each row's maxima reach, and few more; [2, THREADS].

    packed [2, C, THREADS], each two maxima (see `pack_maxima`), of which `least` is at most half.
    """
    upper = (packed & -0x10000).to(tl.float32, bitcast=True)
    lower = (packed << 16).to(tl.float32, bitcast=True)
    low = -over_row_max(-tl.min(tl.maximum(upper, lower), 1), ROWS)
    high = tl.maximum(low, over_row_max(tl.max(tl.minimum(upper, lower), 1), ROWS))
    return bisect(packed, low, high, least, ROWS, ROUNDS)


@triton.jit
def likely_enough(TOP_K: tl.constexpr, seen, num_keys):
    """How many of the keys seen are most likely no more than TOP_K of all num_keys are.

    If keys come in no order of their scores, those of the TOP_K best among the seen are about
    Poisson distributed, and so many of them in less than 1 of 10^5 cases.
    """
    mean = TOP_K * (seen / num_keys)
    return tl.minimum((mean + 4.3 * tl.sqrt(mean) + 3.5).to(tl.int32), TOP_K)


@triton.jit
def raise_bound(
    list_ptr, bound, count, least, ROWS: tl.constexpr, THREADS: tl.constexpr, ROUNDS: tl.constexpr
):
    """A score that at least `least` of each list's first 128 entries reach, or the bound."""
    slot = thread_columns(ROWS, 128, THREADS)[None, :, :]
    place = (list_ptr + slot * ROWS) + thread_rows(ROWS, THREADS)[:, None, :]
    score = load_bits(place, slot < count[:, None, :]).to(tl.float32, bitcast=True)
    # NaN as -inf: what is left is still enough.
    packed = pack_maxima(tl.maximum(score, float("-inf")))
    upper = packed.to(tl.float32, bitcast=True)
    lower = (packed << 16).to(tl.float32, bitcast=True)
    high = over_row_max(tl.max(tl.maximum(upper, lower), 1), ROWS)
    return bisect(packed, bound, tl.maximum(bound, high), least, ROWS, ROUNDS)


@triton.jit
def tile_maxima(
    query, keys, first_key, end, step, KEY_DIM: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The maxima, packed, of TILE groups of keys: those of a tile every `step` keys."""
    best = tl.full([2, TILE * ROWS // (2 * THREADS), THREADS], float("-inf"), tl.float32)
    for start in tl.range(
        first_key, end, step, num_stages=tile_stages(STAGES, KEY_DIM, BLOCK_D), disable_licm=True
    ):
        scores = score_tile(
            query, keys, start, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES, FIT, UPCAST,
            PRECISION,
        )  # fmt: skip
        if FIT < 2:  # noqa: SIM102 (known to the compiler, unlike the next)
            if start + TILE > end:
                inside = in_tile(start, end, ROWS, TILE, THREADS, FIT)[None, :, :]
                scores = tl.where(inside, scores, float("-inf"))
        best = tl.maximum(best, scores)
    return pack_maxima(best)


@triton.jit
def beside(a, b):
    """[2, C, X] twice -> [2, 2 * C, X]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), [2, 2 * a.shape[1], a.shape[2]])


@triton.jit
def two_maxima(
    query, keys, first_key, end, step, apart, KEY_DIM: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`tile_maxima` of the tiles every `step` keys and of those `apart` from them."""
    one = tile_maxima(
        query, keys, first_key, end, step, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES, FIT,
        UPCAST, PRECISION,
    )  # fmt: skip
    other = tile_maxima(
        query, keys, first_key + apart, end, step, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES,
        FIT, UPCAST, PRECISION,
    )  # fmt: skip
    return beside(one, other)


@triton.jit
def first_look(
    query, keys, first_key, end, least, TOP_K: tl.constexpr, KEY_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, SETS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr,
    SPREAD: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A score that at least `least` <= TOP_K of SAMPLE keys reach; [2, THREADS].

    Of the first keys, or if SPREAD, of tiles that are spread over all, which are twice as many or
    more. By the maxima of SETS * TILE >= 2 * TOP_K groups of them; SETS is 1, 2 or 4, and a set's
    groups are those of every SETS-th tile.
    """
    if SPREAD:
        # As many keys for each tile, which is the middle one of theirs.
        apart = (end - first_key) // SAMPLE * TILE
        end = first_key + apart * (SAMPLE // TILE)
        first_key += apart // (2 * TILE) * TILE
        WHOLE: tl.constexpr = 2
    else:
        apart: tl.constexpr = TILE
        end = tl.minimum(end, first_key + SAMPLE)
        WHOLE: tl.constexpr = FIT
    step = SETS * apart
    if SETS == 4:
        one = two_maxima(
            query, keys, first_key, end, step, apart, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D,
            STAGES, WHOLE, UPCAST, PRECISION,
        )  # fmt: skip
        other = two_maxima(
            query, keys, first_key + 2 * apart, end, step, apart, KEY_DIM, ROWS, TILE, THREADS,
            BLOCK_D, STAGES, WHOLE, UPCAST, PRECISION,
        )  # fmt: skip
        return count_bound(beside(one, other), least, ROWS, ROUNDS)
    elif SETS == 2 and TOP_K <= 32:
        packed = two_maxima(
            query, keys, first_key, end, step, apart, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D,
            STAGES, WHOLE, UPCAST, PRECISION,
        )  # fmt: skip
        return count_bound(packed, least, ROWS, ROUNDS)
    else:
        # Each set has its share of them: not as near a bound, but in half the registers.
        share = (least + SETS - 1) // SETS
        bound = tl.full([2, THREADS], float("inf"), tl.float32)
        for at in tl.static_range(SETS):
            packed = tile_maxima(
                query, keys, first_key + at * apart, end, step, KEY_DIM, ROWS, TILE, THREADS,
                BLOCK_D, STAGES, WHOLE, UPCAST, PRECISION,
            )  # fmt: skip
            bound = tl.minimum(bound, count_bound(packed, share, ROWS, ROUNDS))
        return bound
