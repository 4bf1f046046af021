"""Combination of the two halves of a product key: the best sums of two sorted lists.

Of the best k' = min(k, N) of each half, the pair of ranks (a, b), counted from 1, is beaten or
equalled by the a * b - 1 pairs whose ranks are no worse, so only pairs with a * b <= k matter: 119
of 1024 at k = 32.
"""

import triton
import triton.language as tl

from .lists import bits_of, narrow_key, narrow_slot, ordered, ordered_pair, score_of
from .sorting import (
    lists_a_warp,
    sort_ranks,
    sort_rows,
    sort_top,
    warps_of_lists,
    wide_each,
)


@triton.jit
def store_rank_pairs(pairs_ptr, top_k, per_half, LOG_PAIRS: tl.constexpr):
    """Store the ranks (a, b), from 0, with (a + 1) (b + 1) <= top_k; (-1, 0) after the last.

    pairs_ptr [2 ** LOG_PAIRS]; a pair is an int64, a above b.
    """
    position = tl.arange(0, 2**LOG_PAIRS)
    first = tl.zeros_like(position)
    start = tl.zeros_like(position)
    end = 0
    for rank in range(1, per_half + 1):
        end += tl.minimum(top_k // rank, per_half)
        first += (position >= end).to(tl.int32)
        start = tl.where(position >= end, end, start)
    first = tl.where(position < end, first, -1)
    tl.store(pairs_ptr + position, (first.to(tl.int64) << 32) | (position - start))


@triton.jit
def add_pair(first, second):
    """The score bits of the sum of two entries; NaN only if a score is."""
    a = score_of(first)
    b = score_of(second)
    total = tl.where((a + b != a + b) & (a == a) & (b == b), float("-inf"), a + b)
    return total.to(tl.int32, bitcast=True)


@triton.jit
def store_pairs(
    scores_ptr, slots_ptr, token, row, bits, slot, rank, head, num_tokens, top_k, H: tl.constexpr
):  # fmt: skip
    """Store the first top_k ranks of some rows of the block of tokens that starts at token."""
    # 64 bits for where the block starts; inside it, 32 are enough.
    start = (tl.cast(token, tl.int64) * H + head) * top_k
    place = row * (H * top_k) + rank
    mask = (row < num_tokens - token) & (rank < top_k)
    tl.store(scores_ptr + start + place, bits.to(tl.float32, bitcast=True), mask=mask)
    tl.store(slots_ptr + start + place, slot.to(tl.int32), mask=mask)


@triton.jit
def combine_wide(
    first_ptr, second_ptr, pairs_ptr, scores_ptr, slots_ptr, first_row, token, head, num_tokens,
    num_subkeys, top_k, H: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr, EACH: tl.constexpr, LOG_PAIRS: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Combine some rows as `combine` does, whatever their scores."""
    row = first_row + sort_rows(HIGH, LOW)
    pair = tl.load(pairs_ptr + sort_ranks(EACH, 2**LOG_PAIRS // EACH))
    first = tl.load(first_ptr + (pair >> 32) * ROWS + row, mask=pair >= 0, other=0)
    second = tl.load(second_ptr + (pair & 0x7FFFFFFF) * ROWS + row, mask=pair >= 0, other=0)
    # A NaN among a half's scores comes first there, and makes NaN of all sums.
    best = add_pair(tl.load(first_ptr + row), tl.load(second_ptr + row))
    bits = tl.where((best & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, add_pair(first, second))
    slot = (first & 0x7FFFFFFF) * num_subkeys + (second & 0x7FFFFFFF)
    key = tl.where(pair >= 0, ordered_pair(bits, slot), -0x8000000000000000)
    key = sort_top(key, LOG_PAIRS, LOG_TOP)
    store_pairs(
        scores_ptr, slots_ptr, token, row, ordered(bits_of(key)), 0x7FFFFFFF - (key & 0x7FFFFFFF),
        sort_ranks(EACH, 2**LOG_TOP // EACH), head, num_tokens, top_k, H,
    )  # fmt: skip


@triton.jit
def combine(
    first_ptr,  # [k', ROWS], the best of the first half, in order
    second_ptr,  # [k', ROWS]
    pairs_ptr,  # [2 ** LOG_PAIRS]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    token, head, num_tokens, num_subkeys, top_k, H: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, LOG_PAIRS: tl.constexpr, LOG_HALF_TOP: tl.constexpr,
    LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Write the top_k best sums of an entry of each half, of ROWS tokens from token on."""
    EACH: tl.constexpr = 8
    LANES: tl.constexpr = 2**LOG_PAIRS // EACH
    LOW: tl.constexpr = lists_a_warp(ROWS, LANES)
    HIGH: tl.constexpr = warps_of_lists(ROWS // LOW, WARPS, LANES * LOW)
    WIDE_EACH: tl.constexpr = wide_each(LOG_PAIRS)
    WIDE_LOW: tl.constexpr = lists_a_warp(ROWS, 2**LOG_PAIRS // WIDE_EACH)
    WIDE_HIGH: tl.constexpr = warps_of_lists(
        HIGH * LOW // WIDE_LOW, WARPS, 2**LOG_PAIRS // WIDE_EACH * WIDE_LOW
    )
    per_half = tl.minimum(top_k, num_subkeys)
    position = sort_ranks(EACH, LANES)
    pair = tl.load(pairs_ptr + position)
    for first_row in tl.range(0, ROWS, HIGH * LOW, num_stages=1, disable_licm=True):
        row = first_row + sort_rows(HIGH, LOW)
        # The a best of one half and the b best of the other make a * b sums no less than that of
        # the last of each: with a * b >= top_k, a bound.
        bound = tl.full([1, HIGH, 1, LOW], float("-inf"), tl.float32)
        for log_a in tl.static_range(LOG_HALF_TOP + 1):
            others = (top_k + 2**log_a - 1) // 2**log_a
            if (2**log_a <= per_half) & (others <= per_half):
                last_first = tl.load(first_ptr + (2**log_a - 1) * ROWS + row)
                last_second = tl.load(second_ptr + (others - 1) * ROWS + row)
                total = add_pair(last_first, last_second).to(tl.float32, bitcast=True)
                bound = tl.maximum(bound, total)
        first = tl.load(first_ptr + (pair >> 32) * ROWS + row, mask=pair >= 0, other=0)
        second = tl.load(second_ptr + (pair & 0x7FFFFFFF) * ROWS + row, mask=pair >= 0, other=0)
        bits = add_pair(first, second)
        bound_bits = ordered(bound.to(tl.int32, bitcast=True))
        key, exact = narrow_key(bits, bound_bits, pair >= 0, position, LOG_PAIRS)
        exact = exact & ((bits & 0x7FFFFFFF) < 0x7F800000)
        if tl.min(exact.to(tl.int32)) != 0:
            best = narrow_slot(sort_top(key, LOG_PAIRS, LOG_TOP), LOG_PAIRS)
            # A place past the last rank may hold no pair.
            chosen = tl.load(pairs_ptr + best)
            a = tl.load(first_ptr + (chosen >> 32) * ROWS + row, mask=chosen >= 0, other=0)
            b = tl.load(second_ptr + (chosen & 0x7FFFFFFF) * ROWS + row, mask=chosen >= 0, other=0)
            slot = (a & 0x7FFFFFFF) * num_subkeys + (b & 0x7FFFFFFF)
            store_pairs(
                scores_ptr, slots_ptr, token, row, add_pair(a, b), slot,
                sort_ranks(EACH, 2**LOG_TOP // EACH), head, num_tokens, top_k, H,
            )  # fmt: skip
        else:
            for wide_row in tl.range(
                first_row,
                first_row + HIGH * LOW,
                WIDE_HIGH * WIDE_LOW,
                num_stages=1,
                disable_licm=True,
            ):
                combine_wide(
                    first_ptr, second_ptr, pairs_ptr, scores_ptr, slots_ptr, wide_row, token,
                    head, num_tokens, num_subkeys, top_k, H, ROWS, WIDE_HIGH, WIDE_LOW, WIDE_EACH,
                    LOG_PAIRS, LOG_TOP,
                )  # fmt: skip
