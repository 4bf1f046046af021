"""The kernels that combine candidates: of flat keys, and of the two halves of product keys."""

import triton
import triton.language as tl

from ..select.entries import key_index, key_score, pack, sort_key
from .sorting import EVERYTHING, NOTHING, best_candidates, merge, top_sorted


@triton.jit
def store_best(scores_ptr, slots_ptr, at, rank, mask, score, slot, spoilt):
    """Store scores and slots [R, TOP] at rows [R, 1]; where a row is spoilt, NaN of any slots."""
    tl.store(scores_ptr + at + rank, tl.where(spoilt, float("nan"), score), mask=mask)
    tl.store(slots_ptr + at + rank, tl.where(spoilt, rank, slot), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "top_k", "splits", "slots"])
def sort_kernel(
    list_ptr,  # [blocks, H, splits, slots, ROWS], entries
    count_ptr,  # [blocks, H, splits, ROWS]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    num_tokens,
    top_k,
    splits,
    slots,
    C: tl.constexpr,
):
    """A program owns R tokens of one head: it sorts their candidates."""
    R: tl.constexpr = C.rows
    TOP: tl.constexpr = C.top
    ROWS: tl.constexpr = C.list_rows
    groups = tl.cdiv(num_tokens, R)
    head = tl.program_id(0) // groups
    heads = tl.num_programs(0) // groups
    token = tl.program_id(0) % groups * R + tl.arange(0, R)[:, None]
    lists = (token // ROWS * heads + head).to(tl.int64) * splits
    list_ptr += lists * slots * ROWS + token % ROWS
    count_ptr += lists * ROWS + token % ROWS
    at = (token.to(tl.int64) * heads + head) * top_k
    below = tl.full([R, 1], EVERYTHING, tl.int64)
    spoilt = tl.full([R, 1], 0, tl.int32)
    for first in tl.range(0, top_k, TOP, num_stages=1):
        best = best_candidates(list_ptr, count_ptr, below, splits, slots, C)
        below = tl.min(best, 1, keep_dims=True)
        # NaN is the best of all, and makes NaN of them all.
        leader = key_score(tl.max(best, 1, keep_dims=True))
        spoilt |= (leader != leader).to(tl.int32)
        rank = first + tl.arange(0, TOP)[None, :]
        mask = (token < num_tokens) & (rank < top_k)
        store_best(
            scores_ptr, slots_ptr, at, rank, mask, key_score(best), key_index(best), spoilt > 0
        )


@triton.jit
def sum_key(first_ptr, second_ptr, a, b, inside, ROWS: tl.constexpr):
    """Sort keys of the sums of ranks a and b of the sorted halves of rows [R, 1]."""
    total = tl.load(first_ptr + a * (2 * ROWS), mask=inside, other=0.0)
    total += tl.load(second_ptr + b * (2 * ROWS), mask=inside, other=0.0)
    # Where infinities of both signs meet, the slot is ruled out.
    total = tl.where(total != total, float("-inf"), total)
    return tl.where(inside, sort_key(total, (a << 16) | b), NOTHING)


@triton.jit
def best_sums(first_ptr, second_ptr, pairs_ptr, below, per_half, num_pairs, C: tl.constexpr):
    """The best sums of two sorted halves below a bound, [R, TOP] sort keys of pairs of ranks."""
    ROWS: tl.constexpr = C.list_rows
    TOP: tl.constexpr = C.top
    PAIRS: tl.constexpr = 2 * TOP
    if C.in_turns:
        best = tl.full([first_ptr.shape[0], TOP], NOTHING, tl.int64)
    else:
        # Ranks (0, b) and (a, 0) are in order as they are.
        rank = tl.arange(0, TOP)[None, :]
        zero = tl.zeros([1, TOP], tl.int32)
        best = sum_key(first_ptr, second_ptr, zero, rank, rank < per_half, ROWS)
        rank += 1
        best = merge(best, sum_key(first_ptr, second_ptr, rank, zero, rank < per_half, ROWS))
    for start in tl.range(0, num_pairs, PAIRS, num_stages=1):
        at = start + tl.arange(0, PAIRS)[None, :]
        inside = at < num_pairs
        pair = tl.load(pairs_ptr + at, mask=inside, other=0)
        a, b = (pair >> 16) & 0xFFFF, pair & 0xFFFF
        key = sum_key(first_ptr, second_ptr, a, b, inside, ROWS)
        if C.in_turns:
            key = tl.where(key < below, key, NOTHING)
        best = merge(best, top_sorted(key, TOP))
    return best


@triton.jit
def sort_half(list_ptr, count_ptr, sorted_ptr, per_half, splits, slots, C: tl.constexpr):
    """Sort the candidates of rows [2 R, 1], and store the best of each as entries, in order."""
    below = tl.full(list_ptr.shape, EVERYTHING, tl.int64)
    for first in tl.range(0, per_half, C.top, num_stages=1):
        best = best_candidates(list_ptr, count_ptr, below, splits, slots, C)
        below = tl.min(best, 1, keep_dims=True)
        rank = first + tl.arange(0, C.top)[None, :]
        # What is stored may take the place of candidates, all of which are read by now.
        tl.debug_barrier()
        entry = pack(key_score(best), key_index(best))
        tl.store(sorted_ptr + rank.to(tl.int64) * C.list_rows, entry, mask=rank < per_half)
    tl.debug_barrier()


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_subkeys",
        "top_k",
        "num_pairs",
        "splits",
        "slots",
        "sorted_at",
    ]
)
def combine_kernel(
    list_ptr,  # [blocks, 2 H, splits, slots, ROWS], entries
    count_ptr,  # [blocks, 2 H, splits, ROWS]
    pairs_ptr,  # [num_pairs], pairs of ranks
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    num_tokens,
    num_subkeys,
    top_k,
    num_pairs,
    splits,
    slots,
    sorted_at,
    C: tl.constexpr,
):
    """A program owns R tokens of one head: it sorts both halves, then the best of their sums."""
    R: tl.constexpr = C.rows
    TOP: tl.constexpr = C.top
    ROWS: tl.constexpr = C.list_rows
    groups = tl.cdiv(num_tokens, R)
    head = tl.program_id(0) // groups
    heads = tl.num_programs(0) // groups
    first = tl.program_id(0) % groups * R
    per_half = tl.minimum(top_k, num_subkeys)
    lists = (first // ROWS * heads + head).to(tl.int64) * (2 * splits)
    list_ptr += lists * slots * ROWS + first % ROWS
    count_ptr += lists * ROWS + first % ROWS
    half_row = tl.arange(0, 2 * R)[:, None]
    half_lists = (half_row // R * splits).to(tl.int64)
    half_ptr = list_ptr + (half_lists * slots * ROWS + half_row % R)
    half_count_ptr = count_ptr + (half_lists * ROWS + half_row % R)
    sorted_at = tl.cast(sorted_at, tl.int64) * ROWS
    sort_half(half_ptr, half_count_ptr, half_ptr + sorted_at, per_half, splits, slots, C)

    row = tl.arange(0, R)[:, None]
    # Of an entry the score is the second word, and the sub-key the first.
    first_ptr = (list_ptr + sorted_at + row).to(tl.pointer_type(tl.float32)) + 1
    second_ptr = first_ptr + tl.cast(splits, tl.int64) * slots * (2 * ROWS)
    best_first, best_second = tl.load(first_ptr), tl.load(second_ptr)
    spoilt = (best_first != best_first) | (best_second != best_second)
    token = first + row
    at = (token.to(tl.int64) * heads + head) * top_k
    below = tl.full([R, 1], EVERYTHING, tl.int64)
    for turn in tl.range(0, top_k, TOP, num_stages=1):
        best = best_sums(first_ptr, second_ptr, pairs_ptr, below, per_half, num_pairs, C)
        below = tl.min(best, 1, keep_dims=True)
        rank = turn + tl.arange(0, TOP)[None, :]
        mask = rank < top_k
        pair = key_index(best)
        i_ptr = first_ptr.to(tl.pointer_type(tl.int32)) - 1 + ((pair >> 16) & 0xFFFF) * (2 * ROWS)
        j_ptr = second_ptr.to(tl.pointer_type(tl.int32)) - 1 + (pair & 0xFFFF) * (2 * ROWS)
        slot = tl.load(i_ptr, mask=mask, other=0) * num_subkeys + tl.load(j_ptr, mask=mask, other=0)
        mask &= token < num_tokens
        store_best(scores_ptr, slots_ptr, at, rank, mask, key_score(best), slot, spoilt)
