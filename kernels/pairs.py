"""Combination of the two halves of a product key: the best sums of two sorted lists.

Of the best k' = min(k, N) of each half, the pair of ranks (a, b), counted from 1, is beaten or
equalled by the a * b - 1 pairs whose ranks are no worse, so only pairs with a * b <= k matter: 119
of 1024 at k = 32.

Entry a of row r of the first half is at first_ptr + a * ROWS + r, likewise the second half's (see
`lists`); rank a of the result goes to place + r * STRIDE + a of scores and slots.
"""

import triton
import triton.language as tl

from .appending import append
from .entries import (
    index_of,
    load_bits,
    narrow_key,
    narrow_rank,
    narrow_score,
    ordered,
    score_of,
)
from .lists import rows_at_once
from .selection import cut_lists
from .sorting import keys_each, lists_a_warp, sort_rows, sort_top, warps_of_lists
from .thread_form import thread_columns, thread_rows


@triton.jit
def rank_pairs(TOP_K: tl.constexpr, HALF_K: tl.constexpr, PAIRS: tl.constexpr):
    """The ranks (a, b), from 0, with (a + 1) (b + 1) <= TOP_K; (-1, 0) after the last; [PAIRS]."""
    position = tl.arange(0, PAIRS)
    first = tl.zeros_like(position)
    start = tl.zeros_like(position)
    end = 0
    for rank in range(1, HALF_K + 1):
        end += tl.minimum(TOP_K // rank, HALF_K)
        first += (position >= end).to(tl.int32)
        start = tl.where(position >= end, end, start)
    inside = position < end
    return tl.where(inside, first, -1), tl.where(inside, position - start, 0)


@triton.jit
def store_rank_pairs(pairs_ptr, TOP_K: tl.constexpr, HALF_K: tl.constexpr, LOG_PAIRS: tl.constexpr):
    """Store `rank_pairs` at pairs_ptr [2 ** LOG_PAIRS], each an int32, a above b."""
    first, second = rank_pairs(TOP_K, HALF_K, 2**LOG_PAIRS)
    tl.store(pairs_ptr + tl.arange(0, 2**LOG_PAIRS), (first << 16) | second)


@triton.jit
def sums_bound(
    first_ptr, second_ptr, row, TOP_K: tl.constexpr, HALF_K: tl.constexpr, ROWS: tl.constexpr,
    LOG_HALF_TOP: tl.constexpr,
):  # fmt: skip
    """A bound that at least TOP_K sums of each row reach."""
    # The a best of one half and the b best of the other make a * b sums no less than that of the
    # last of each: with a * b >= TOP_K, a bound.
    bound = tl.full(row.shape, float("-inf"), tl.float32)
    for log_a in tl.static_range(LOG_HALF_TOP + 1):
        if 2**log_a <= HALF_K and HALF_K * 2**log_a >= TOP_K:
            a = score_of(tl.load(first_ptr + (2**log_a - 1) * ROWS + row))
            b = score_of(tl.load(second_ptr + ((TOP_K - 1) // 2**log_a) * ROWS + row))
            # NaN, of infinities say, is no bound.
            bound = tl.where(a + b > bound, a + b, bound)
    return bound


@triton.jit
def load_pair(first_ptr, second_ptr, pair, row, mask, ROWS: tl.constexpr):
    """The two scores of pairs; -inf where masked."""
    a = load_bits((first_ptr + row) + (pair >> 16) * ROWS, mask)
    b = load_bits((second_ptr + row) + (pair & 0xFFFF) * ROWS, mask)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def store_sums(
    scores_ptr, slots_ptr, score, chosen, first_ptr, second_ptr, place, first_row, num_rows,
    num_subkeys, STRIDE: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store scores [LISTS, RANKS] and the chosen pairs' slots, of the rows from first_row on."""
    row = first_row + tl.arange(0, score.shape[0])[:, None]
    rank = tl.arange(0, score.shape[1])[None, :]
    mask = (row < num_rows) & (rank < TOP_K)
    i = tl.load((first_ptr + row) + (chosen >> 16) * ROWS, mask=mask, other=0)
    j = tl.load((second_ptr + row) + (chosen & 0xFFFF) * ROWS, mask=mask, other=0)
    place = (place + row.to(tl.int64) * STRIDE) + rank
    tl.store(scores_ptr + place, score, mask=mask)
    tl.store(slots_ptr + place, index_of(i) * num_subkeys + index_of(j), mask=mask)


@triton.jit
def by_row(x):
    """From sort form to [lists, ranks]: neighbouring ranks to neighbouring threads."""
    return tl.reshape(
        tl.permute(x, (1, 3, 2, 0)), [x.shape[1] * x.shape[3], x.shape[2] * x.shape[0]]
    )


@triton.jit
def combine_narrow(
    first_ptr, second_ptr, pairs_ptr, scores_ptr, slots_ptr, place, first_row, num_rows,
    num_subkeys, STRIDE: tl.constexpr, TOP_K: tl.constexpr, HALF_K: tl.constexpr,
    ROWS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, EACH: tl.constexpr,
    LOG_PAIRS: tl.constexpr, LOG_HALF_TOP: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Combine HIGH * LOW rows by narrow keys, if that is exact for all of them; whether it was."""
    LANES: tl.constexpr = 2**LOG_PAIRS // EACH
    row = first_row + sort_rows(HIGH, LOW)
    bound = sums_bound(first_ptr, second_ptr, row, TOP_K, HALF_K, ROWS, LOG_HALF_TOP)
    bound = ordered(bound.to(tl.int32, bitcast=True))
    lane = tl.arange(0, LANES)[None, None, :, None]
    own = tl.arange(0, EACH)[:, None, None, None]
    # See `sort_rows` for the hint.
    pair = tl.load(pairs_ptr + tl.max_contiguous(lane * EACH + own, [1, 1, 1, 1]))
    mask = (pair >= 0) & (row < num_rows)
    a, b = load_pair(first_ptr, second_ptr, pair, row, mask, ROWS)
    key, exact = narrow_key((a + b).to(tl.int32, bitcast=True), bound, LOG_PAIRS, 0)
    all_exact = tl.min(exact.to(tl.int32)) != 0
    if all_exact:
        best = by_row(sort_top(key, LOG_PAIRS, LOG_TOP))
        score = narrow_score(best, by_row(bound), LOG_PAIRS)
        chosen = tl.maximum(tl.load(pairs_ptr + narrow_rank(best, LOG_PAIRS)), 0)
        store_sums(
            scores_ptr, slots_ptr, score, chosen, first_ptr, second_ptr, place, first_row,
            num_rows, num_subkeys, STRIDE, TOP_K, ROWS,
        )  # fmt: skip
    return all_exact


@triton.jit
def spoilt_rows(first_ptr, second_ptr, row):
    """Whether a NaN is among a half's scores; it came first there, and makes NaN of all sums."""
    a = score_of(tl.load(first_ptr + row))
    b = score_of(tl.load(second_ptr + row))
    return (a != a) | (b != b)


@triton.jit
def sum_tile(
    first_ptr, second_ptr, pairs_ptr, spoilt, start, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The sums of TILE pairs from start on, in thread form; NaN of no pair, which is not appended.

    However bad a sum is, nothing that is none may stand in its stead.
    """
    row = thread_rows(ROWS, THREADS)[:, None, :]
    pair = tl.load(pairs_ptr + start + thread_columns(ROWS, TILE, THREADS))[None, :, :]
    a, b = load_pair(first_ptr, second_ptr, pair, row, pair >= 0, ROWS)
    # Where infinities of both signs meet, the slot is ruled out.
    total = tl.where(a + b != a + b, float("-inf"), a + b)
    # To be appended, whatever the bound.
    total = tl.where(spoilt, float("inf"), total)
    return tl.where(pair < 0, float("nan"), total)


@triton.jit
def append_sums(
    first_ptr, second_ptr, list_ptr, pairs_ptr, spoilt, bound, count, start, stop, num_pairs,
    ROWS: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Append the sums of the pairs start .. stop that reach the bound; the new lengths."""
    for tile in tl.range(start, stop, TILE, num_stages=1):
        total = sum_tile(first_ptr, second_ptr, pairs_ptr, spoilt, tile, ROWS, TILE, THREADS)
        count = append(total, tile, num_pairs, bound, count, list_ptr, ROWS, TILE, 2, False)
    return count


@triton.jit
def combine_by_lists(
    first_ptr, second_ptr, list_ptr, pairs_ptr, scores_ptr, slots_ptr, place, num_rows,
    num_subkeys, num_pairs, STRIDE: tl.constexpr, TOP_K: tl.constexpr, HALF_K: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_PAIRS: tl.constexpr, LOG_SUMS: tl.constexpr,
    LOG_HALF_TOP: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Combine all rows, whatever they hold: list what reaches the bound, and sort the lists."""
    TILE: tl.constexpr = 32
    THREADS: tl.constexpr = 32 * WARPS
    row = thread_rows(ROWS, THREADS)
    bound = sums_bound(first_ptr, second_ptr, row, TOP_K, HALF_K, ROWS, LOG_HALF_TOP)
    bound = tl.where(row < num_rows, bound, float("inf"))
    spoilt = spoilt_rows(first_ptr, second_ptr, row)[:, None, :]
    count = tl.zeros([2, THREADS], tl.int32)
    # The more are wanted, the more sums reach the bound; beyond 256 registers do not suffice.
    MOST: tl.constexpr = LOG_TOP + (2 if LOG_TOP == 7 or LOG_TOP == 8 else 1)
    LOG_SHORT: tl.constexpr = min(LOG_SUMS, max(6, MOST))
    if LOG_SUMS < LOG_PAIRS:
        longest = 0
        start = 0
        while start < num_pairs:
            # As far as no list can overflow.
            stop = tl.minimum(num_pairs, start + (2**LOG_SUMS - longest) // TILE * TILE)
            count = append_sums(
                first_ptr, second_ptr, list_ptr, pairs_ptr, spoilt, bound, count, start, stop,
                num_pairs, ROWS, TILE, THREADS,
            )  # fmt: skip
            start = stop
            longest = tl.max(count)
            if (start >= num_pairs) | (longest > 2**LOG_SUMS - TILE):
                bound, count, _short = cut_lists(
                    list_ptr, bound, count, TOP_K, ROWS, WARPS, LOG_SUMS, LOG_SHORT, LOG_TOP, False
                )  # fmt: skip
                longest = TOP_K
    else:
        count = append_sums(
            first_ptr, second_ptr, list_ptr, pairs_ptr, spoilt, bound, count, 0, num_pairs,
            num_pairs, ROWS, TILE, THREADS,
        )  # fmt: skip
        cut_lists(list_ptr, bound, count, TOP_K, ROWS, WARPS, LOG_SUMS, LOG_SHORT, LOG_TOP, False)
    LISTS: tl.constexpr = rows_at_once(min(ROWS, 32), LOG_TOP, WARPS)
    rank = tl.arange(0, 2**LOG_TOP)[None, :]
    for first_row in tl.range(0, ROWS, LISTS, num_stages=1):
        list_row = first_row + tl.arange(0, LISTS)[:, None]
        mask = (list_row < num_rows) & (rank < TOP_K)
        entry = tl.load(list_ptr + rank * ROWS + list_row, mask=mask, other=0)
        chosen = tl.load(pairs_ptr + index_of(entry), mask=mask, other=0)
        nan = spoilt_rows(first_ptr, second_ptr, list_row)
        score = tl.where(nan, float("nan"), score_of(entry))
        store_sums(
            scores_ptr, slots_ptr, score, chosen, first_ptr, second_ptr, place,
            first_row, num_rows, num_subkeys, STRIDE, TOP_K, ROWS,
        )  # fmt: skip


@triton.jit
def combine(
    first_ptr,  # [k', ROWS], the best of the first half, in order
    second_ptr,  # [k', ROWS]
    list_ptr,  # [2 ** LOG_SUMS + 1, ROWS]
    pairs_ptr,  # [2 ** LOG_PAIRS]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    place, num_rows, num_subkeys, num_pairs, STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    HALF_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, LOG_PAIRS: tl.constexpr,
    LOG_SUMS: tl.constexpr, LOG_HALF_TOP: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Write the TOP_K best sums of an entry of each half, for every row."""
    exact = False
    if LOG_PAIRS <= 7:
        EACH: tl.constexpr = keys_each(LOG_TOP, 32, ROWS, LOG_PAIRS, WARPS)
        LANES: tl.constexpr = 2**LOG_PAIRS // EACH
        LOW: tl.constexpr = lists_a_warp(ROWS, LANES)
        HIGH: tl.constexpr = warps_of_lists(ROWS // LOW, WARPS, LANES * LOW)
        exact = True
        for first_row in tl.range(0, ROWS, HIGH * LOW, num_stages=1, disable_licm=True):
            exact &= combine_narrow(
                first_ptr, second_ptr, pairs_ptr, scores_ptr, slots_ptr, place, first_row,
                num_rows, num_subkeys, STRIDE, TOP_K, HALF_K, ROWS, HIGH, LOW, EACH, LOG_PAIRS,
                LOG_HALF_TOP, LOG_TOP,
            )  # fmt: skip
    if not exact:
        combine_by_lists(
            first_ptr, second_ptr, list_ptr, pairs_ptr, scores_ptr, slots_ptr, place, num_rows,
            num_subkeys, num_pairs, STRIDE, TOP_K, HALF_K, ROWS, WARPS, LOG_PAIRS, LOG_SUMS,
            LOG_HALF_TOP, LOG_TOP,
        )  # fmt: skip
