"""Appending to the rows' lists the scores of a tile that reach the rows' bounds: jit helpers.

Scores are in thread form (see `thread_form`), lists in memory (see `lists`).
"""

import triton
import triton.language as tl

from .assembly import reaches
from .scoring import in_tile, tile_from
from .thread_form import thread_columns, thread_rows, threads_before


@triton.jit
def append_rows(
    scores, index, inside, bound, count, row, list_ptr, ROWS: tl.constexpr, FIT: tl.constexpr,
    WITH_NAN: tl.constexpr,
):  # fmt: skip
    """Append scores [C, THREADS], one row a thread, that reach the bound; the new lengths.

    bound, count, row [THREADS]; inside, of which places to take any, unless they FIT.
    """
    kept = reaches(scores, bound[None, :], WITH_NAN)
    if WITH_NAN:  # noqa: SIM108 (known to the compiler)
        mask = ~(scores < bound[None, :])
    else:
        mask = scores >= bound[None, :]
    if FIT < 2:
        kept = tl.where(inside, kept, 0.0)
        mask &= inside
    before, total = threads_before(tl.sum(kept, 0), ROWS)
    # Counts on top of 2 ** 23 are those of its bits: addresses need no conversion, and only where
    # a list starts.
    own = tl.arange(0, scores.shape[0])[:, None]
    first = (count + before.to(tl.int32) + 0x4B000000).to(tl.float32, bitcast=True)
    counted = tl.cumsum(tl.where(own == 0, kept + first[None, :], kept), 0)
    slot = counted.to(tl.int32, bitcast=True).to(tl.int64)
    thread_ptr = (list_ptr - (0x4B000000 + 1) * ROWS) + row
    place = thread_ptr[None, :] + slot * ROWS
    place32 = place.to(tl.pointer_type(tl.int32))[:, :, None] + tl.arange(0, 2)[None, None, :]
    both = tl.join(index, scores.to(tl.int32, bitcast=True))
    tl.store(place32, both, mask=mask[:, :, None])
    return count + total.to(tl.int32)


@triton.jit
def append_places(
    scores, index, inside, bound, count, list_ptr, ROWS: tl.constexpr, FIT: tl.constexpr,
    WITH_NAN: tl.constexpr,
):  # fmt: skip
    """`append` of scores [2, C, THREADS] with their keys' indices [C, THREADS]."""
    C: tl.constexpr = scores.shape[1]
    THREADS: tl.constexpr = scores.shape[2]
    if C > 16:
        # As many at a time as leave registers.
        scores = tl.permute(tl.reshape(scores, [2, 2, C // 2, THREADS]), (0, 2, 3, 1))
        scores_0, scores_1 = tl.split(scores)
        index_0, index_1 = tl.split(tl.permute(tl.reshape(index, [2, C // 2, THREADS]), (1, 2, 0)))
        inside = tl.permute(tl.reshape(inside, [2, C // 2, THREADS]), (1, 2, 0))
        inside_0, inside_1 = tl.split(inside)
        count = append_places(
            scores_0, index_0, inside_0, bound, count, list_ptr, ROWS, FIT, WITH_NAN
        )
        return append_places(
            scores_1, index_1, inside_1, bound, count, list_ptr, ROWS, FIT, WITH_NAN
        )
    else:
        scores_0, scores_1 = tl.split(tl.permute(scores, (1, 2, 0)))
        bound_0, bound_1 = tl.split(tl.permute(bound, (1, 0)))
        count_0, count_1 = tl.split(tl.permute(count, (1, 0)))
        row_0, row_1 = tl.split(tl.permute(thread_rows(ROWS, THREADS), (1, 0)))
        count_0 = append_rows(
            scores_0, index, inside, bound_0, count_0, row_0, list_ptr, ROWS, FIT, WITH_NAN
        )
        count_1 = append_rows(
            scores_1, index, inside, bound_1, count_1, row_1, list_ptr, ROWS, FIT, WITH_NAN
        )
        return tl.permute(tl.join(count_0, count_1), (1, 0))


@triton.jit
def append(
    scores, start, end, bound, count, list_ptr, ROWS: tl.constexpr, TILE: tl.constexpr,
    FIT: tl.constexpr, WITH_NAN: tl.constexpr,
):  # fmt: skip
    """Append the scores that reach their rows' bounds to the rows' lists; the new lengths.

    scores [2, C, THREADS], of the tile of keys start .. end; bound, count [2, THREADS].
    """
    THREADS: tl.constexpr = count.shape[1]
    index = tile_from(start, end, TILE, FIT) + thread_columns(ROWS, TILE, THREADS)
    inside = in_tile(start, end, ROWS, TILE, THREADS, FIT)
    return append_places(scores, index, inside, bound, count, list_ptr, ROWS, FIT, WITH_NAN)
