"""A lower bound of each row's k-th best score, from the maxima of groups of scores.

Scores are in thread form (see `thread_form`).
"""

import triton
import triton.language as tl

from .entries import ordered
from .scoring import in_tile, score_tile, tile_stages
from .thread_form import over_row_max, over_row_sum


@triton.jit
def pack_maxima(best):
    """Two maxima in an int32, [2, C, THREADS] -> [2, C / 2, THREADS], to spare registers.

    Each keeps the upper half of its `ordered` bits: it is rounded down, as a bound may be.
    """
    C: tl.constexpr = best.shape[1]
    bits = ordered(best.to(tl.int32, bitcast=True))
    halves = tl.permute(tl.reshape(bits, [2, 2, C // 2, best.shape[2]]), (0, 2, 3, 1))
    upper, lower = tl.split(halves)
    return (upper & -0x10000) | ((lower >> 16) & 0xFFFF)


@triton.jit
def count_bound(packed, LEAST: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """A score that at least LEAST of each row's maxima reach, and few more; [2, THREADS].

    packed [2, C, THREADS], each two maxima (see `pack_maxima`), of which LEAST is at most half.
    Bisection from below may stop anywhere, the bound holds.
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
def tile_maxima(
    query, keys, first_key, end, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The maxima, packed, of TILE groups of keys: those of a tile every STEP keys."""
    best = tl.full([2, TILE * ROWS // (2 * THREADS), THREADS], float("-inf"), tl.float32)
    for start in tl.range(
        first_key, end, STEP, num_stages=tile_stages(STAGES, KEY_DIM, BLOCK_D), disable_licm=True
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
    query, keys, first_key, end, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`tile_maxima` of the tiles every STEP keys and of those next to them."""
    one = tile_maxima(
        query, keys, first_key, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STEP, STAGES, FIT,
        UPCAST, PRECISION,
    )  # fmt: skip
    other = tile_maxima(
        query, keys, first_key + TILE, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STEP, STAGES,
        FIT, UPCAST, PRECISION,
    )  # fmt: skip
    return beside(one, other)


@triton.jit
def first_look(
    query, keys, first_key, end, TOP_K: tl.constexpr, KEY_DIM: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A score that at least TOP_K of the first SAMPLE keys reach, in each row; [2, THREADS].

    By the maxima of PARTS * TILE >= 2 * TOP_K groups of them; PARTS is 1, 2 or 4.
    """
    end = tl.minimum(end, first_key + SAMPLE)
    STEP: tl.constexpr = PARTS * TILE
    if PARTS == 4:
        one = two_maxima(
            query, keys, first_key, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STEP, STAGES, FIT,
            UPCAST, PRECISION,
        )  # fmt: skip
        other = two_maxima(
            query, keys, first_key + 2 * TILE, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STEP,
            STAGES, FIT, UPCAST, PRECISION,
        )  # fmt: skip
        return count_bound(beside(one, other), TOP_K, ROWS, ROUNDS)
    elif PARTS == 2 and TOP_K <= 32:
        packed = two_maxima(
            query, keys, first_key, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STEP, STAGES, FIT,
            UPCAST, PRECISION,
        )  # fmt: skip
        return count_bound(packed, TOP_K, ROWS, ROUNDS)
    else:
        # Each part has its share of them: not as near a bound, but in half the registers.
        SHARE: tl.constexpr = (TOP_K + PARTS - 1) // PARTS
        bound = tl.full([2, THREADS], float("inf"), tl.float32)
        for part in tl.static_range(PARTS):
            packed = tile_maxima(
                query, keys, first_key + part * TILE, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D,
                STEP, STAGES, FIT, UPCAST, PRECISION,
            )  # fmt: skip
            bound = tl.minimum(bound, count_bound(packed, SHARE, ROWS, ROUNDS))
        return bound
