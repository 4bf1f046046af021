"""Product-key top-k: the k best of N² slots from two codebooks of N sub-keys (paper 3.1).

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    query [T, H, 2 D]; subkeys [H, 2, N, D]; scores, slots [T, H, k]; slot = i · N + j
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .assembly import opaque
from .entries import bits_of, ordered_pair
from .flat_key_topk import flat_key_topk, flat_key_topk_bytes
from .launch import (
    MAX_PAIRS,
    Lists,
    Sums,
    choose_lists,
    choose_splits,
    choose_sums,
    list_programs,
    log2_ceil,
    tile_stride,
)
from .lists import load_best, store_best
from .lookup_bytes import list_bytes_at_most, select_bytes, sort_bytes_at_most, split_bytes
from .pairs import combine, rank_pairs, store_rank_pairs
from .selection import select
from .split_topk import NOTHING, pair_index, pair_score, split_topk


@triton.jit(do_not_specialize=["num_tokens"])
def product_key_topk_kernel(
    query_ptr,  # [T, H, 2 D]
    subkeys_ptr,  # [H, 2, N, D]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    list_ptr,  # [programs, SLOTS * ROWS + 2 ** (LOG_PAIRS - 1)], entries and pairs of ranks
    num_tokens, num_subkeys, stride, num_pairs, TOP_K: tl.constexpr, HALF_K: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, SLOTS: tl.constexpr,
    KEEP: tl.constexpr, LOG_LIST: tl.constexpr, LOG_PAIRS: tl.constexpr, LOG_SUMS: tl.constexpr,
    LOG_HALF_TOP: tl.constexpr, LOG_TOP: tl.constexpr, SETS: tl.constexpr, SAMPLE: tl.constexpr,
    ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr, GROWTH: tl.constexpr, SPECULATE: tl.constexpr,
    SPREAD: tl.constexpr, FIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head at a time, and its lists."""
    BEST: tl.constexpr = 2**LOG_HALF_TOP * ROWS
    list_ptr += tl.program_id(0).to(tl.int64) * (ROWS * SLOTS + 2 ** (LOG_PAIRS - 1))
    pairs_ptr = (list_ptr + ROWS * SLOTS).to(tl.pointer_type(tl.int32))
    store_rank_pairs(pairs_ptr, TOP_K, HALF_K, LOG_PAIRS)
    for block in tl.range(
        tl.program_id(0),
        tl.cdiv(num_tokens, ROWS) * H,
        tl.num_programs(0),
        num_stages=1,
        disable_licm=True,
    ):
        head = block % H
        token = block // H * ROWS
        num_rows = num_tokens - token
        # 64 bits for where the tile starts; inside it, 32 are enough.
        first = tl.cast(token, tl.int64) * H + head
        for half in tl.range(2, num_stages=1, disable_licm=True):
            book = tl.cast(head * 2 + half, tl.int64) * num_subkeys
            select(
                query_ptr + (first * 2 + half) * D, 2 * H * D, num_rows, (subkeys_ptr, book),
                list_ptr + (half * BEST if KEEP else 0), 0, num_subkeys, stride, HALF_K, D, ROWS,
                TILE, BLOCK_D, WARPS, STAGES, LOG_LIST, LOG_HALF_TOP, SETS, SAMPLE, ROUNDS,
                FIRST_CUT, GROWTH, SPECULATE, SPREAD, FIT, UPCAST, PRECISION,
            )  # fmt: skip
            if half == 0 and not KEEP:
                # Where the result will be written, so that it takes no memory of its own.
                store_best(
                    list_ptr, scores_ptr, slots_ptr, first * TOP_K, num_rows, H * TOP_K, HALF_K,
                    ROWS, WARPS, LOG_HALF_TOP,
                )  # fmt: skip
                tl.debug_barrier()
        if KEEP:
            best_ptr = opaque(list_ptr)
            first_ptr = best_ptr
            second_ptr = best_ptr + BEST
        else:
            best_ptr = list_ptr
            first_ptr = best_ptr + BEST
            second_ptr = best_ptr
            load_best(
                first_ptr, scores_ptr, slots_ptr, first * TOP_K, num_rows, H * TOP_K, HALF_K, ROWS,
                WARPS, LOG_HALF_TOP,
            )  # fmt: skip
            tl.debug_barrier()
        combine(
            first_ptr, second_ptr, best_ptr + 2 * BEST, pairs_ptr, scores_ptr, slots_ptr,
            first * TOP_K, num_rows, num_subkeys, num_pairs, H * TOP_K, TOP_K, HALF_K, ROWS, WARPS,
            LOG_PAIRS, LOG_SUMS, LOG_HALF_TOP, LOG_TOP,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens"])
def combine_halves_kernel(
    half_scores_ptr,  # [T, H, 2, k']
    half_slots_ptr,  # [T, H, 2, k']
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    list_ptr,  # [programs, SLOTS * ROWS + 2 ** (LOG_PAIRS - 1)], entries and pairs of ranks
    num_tokens, num_subkeys, num_pairs, TOP_K: tl.constexpr, HALF_K: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    LOG_PAIRS: tl.constexpr, LOG_SUMS: tl.constexpr, LOG_HALF_TOP: tl.constexpr,
    LOG_TOP: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head at a time, and its lists."""
    BEST: tl.constexpr = 2**LOG_HALF_TOP * ROWS
    list_ptr += tl.program_id(0).to(tl.int64) * (ROWS * SLOTS + 2 ** (LOG_PAIRS - 1))
    pairs_ptr = (list_ptr + ROWS * SLOTS).to(tl.pointer_type(tl.int32))
    store_rank_pairs(pairs_ptr, TOP_K, HALF_K, LOG_PAIRS)
    for block in tl.range(
        tl.program_id(0),
        tl.cdiv(num_tokens, ROWS) * H,
        tl.num_programs(0),
        num_stages=1,
        disable_licm=True,
    ):
        token = block // H * ROWS
        num_rows = num_tokens - token
        first = tl.cast(token, tl.int64) * H + block % H
        for half in tl.range(2, num_stages=1, disable_licm=True):
            load_best(
                list_ptr + half * BEST, half_scores_ptr, half_slots_ptr,
                (first * 2 + half) * HALF_K, num_rows, 2 * H * HALF_K, HALF_K, ROWS, WARPS,
                LOG_HALF_TOP,
            )  # fmt: skip
        tl.debug_barrier()
        combine(
            list_ptr, list_ptr + BEST, list_ptr + 2 * BEST, pairs_ptr, scores_ptr, slots_ptr,
            first * TOP_K, num_rows, num_subkeys, num_pairs, H * TOP_K, TOP_K, HALF_K, ROWS, WARPS,
            LOG_PAIRS, LOG_SUMS, LOG_HALF_TOP, LOG_TOP,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["splits"])
def merge_halves_kernel(
    part_ptr,  # [T * H, 2, splits, TOP], int64
    scores_ptr,  # [T * H, k]
    slots_ptr,  # [T * H, k]
    num_subkeys, splits, TOP_K: tl.constexpr, HALF_K: tl.constexpr, HALF_TOP: tl.constexpr,
    TOP: tl.constexpr, SIZE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns one token and head: it merges both halves' stretches and adds them."""
    row = tl.program_id(0).to(tl.int64)
    part_ptr += row * 2 * splits * HALF_TOP
    half = tl.arange(0, 2)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    mask = place < splits * HALF_TOP
    part = tl.load(part_ptr + (half * splits * HALF_TOP + place), mask=mask, other=NOTHING)
    best = tl.topk(part, HALF_TOP)
    first, second = tl.split(tl.permute(best, (1, 0)))
    a, b = rank_pairs(TOP_K, HALF_K, PAIRS)
    total = tl.gather(pair_score(first), tl.maximum(a, 0), 0) + tl.gather(pair_score(second), b, 0)
    # Where infinities of both signs meet, the slot is ruled out.
    total = tl.where(total != total, float("-inf"), total)
    pair = ordered_pair(total.to(tl.int32, bitcast=True), (a << 16) | b)
    best_sums = tl.topk(tl.where(a >= 0, pair, NOTHING), TOP)
    # A NaN among a half's scores came first, and makes NaN of all sums.
    spoilt = tl.max(tl.max(bits_of(best), 1), 0) == 0x7FFFFFFF
    score = tl.where(spoilt, float("nan"), pair_score(best_sums))
    rank = tl.arange(0, TOP)
    chosen = tl.where(rank < TOP_K, pair_index(best_sums), 0)
    i = tl.gather(pair_index(first), chosen >> 16, 0)
    j = tl.gather(pair_index(second), chosen & 0xFFFF, 0)
    tl.store(scores_ptr + row * TOP_K + rank, score, mask=rank < TOP_K)
    tl.store(slots_ptr + row * TOP_K + rank, i * num_subkeys + j, mask=rank < TOP_K)


def count_pairs(top_k: int, per_half: int) -> int:
    """Pairs of ranks a, b <= per_half that can be among the best sums: those of a·b <= top_k."""
    return sum(min(top_k // a, per_half) for a in range(1, per_half + 1))


def product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` slots of highest score, exactly (paper equation 4 and the text below it).

    Args:
        query: [T, H, d_q].
        subkeys: [H, 2, N, d_q / 2].
        top_k: 1 <= top_k <= N².

    Returns:
        scores [T, H, top_k], descending, float32, and slots [T, H, top_k], int32. A NaN among a
        query's sub-key scores makes all its scores NaN. The sum of +inf and -inf is -inf.
    """
    num_tokens, heads, _ = query.shape
    num_subkeys, half_dim = subkeys.shape[2:]
    scores = query.new_empty(num_tokens, heads, top_k, dtype=torch.float32)
    slots = query.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    if num_tokens == 0:
        return scores, slots
    per_half = min(top_k, num_subkeys)
    num_pairs = count_pairs(top_k, per_half)
    if num_pairs > MAX_PAIRS:
        raise ValueError(
            f"top_k is {top_k} of {num_subkeys}² slots: {num_pairs} pairs of ranks to combine, but "
            f"the kernels take at most {MAX_PAIRS}"
        )
    # Each half is a head to the kernels that know flat keys only.
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    log_top = max(4, log2_ceil(top_k))
    log_pairs = max(6, log_top, log2_ceil(num_pairs))
    few = choose_splits(halves, books, per_half)
    if few is not None:
        part = split_topk(halves, books, few)
        merge_halves_kernel[(num_tokens * heads,)](
            part, scores, slots, num_subkeys, few.splits, TOP_K=top_k, HALF_K=per_half,
            HALF_TOP=few.top, TOP=2**log_top, SIZE=few.merged, PAIRS=2**log_pairs,
            num_warps=few.merge_warps,
        )  # fmt: skip
        return scores, slots
    many = choose_lists(query, books, per_half)
    sums = choose_sums(many, top_k, num_pairs)
    constants: dict[str, object] = {
        "TOP_K": top_k, "HALF_K": per_half, "H": heads, "LOG_PAIRS": sums.log_pairs,
        "LOG_SUMS": sums.log_list, "LOG_HALF_TOP": many.log_top, "LOG_TOP": sums.log_top,
    }  # fmt: skip
    if sums.apart is None:
        lists = new_lists(query, many, sums)
        product_key_topk_kernel[(len(lists),)](
            query, subkeys, scores, slots, lists, num_tokens, num_subkeys,
            tile_stride(num_subkeys, many.tile), num_pairs, D=half_dim, SLOTS=sums.slots,
            KEEP=sums.keep, **many.constants() | constants, **many.options(),
        )  # fmt: skip
        return scores, slots
    half_scores, half_slots = flat_key_topk(halves, books, per_half)
    lists = new_lists(query, sums.apart, sums)
    combine_halves_kernel[(len(lists),)](
        half_scores, half_slots, scores, slots, lists, num_tokens, num_subkeys, num_pairs,
        ROWS=sums.apart.rows, WARPS=sums.apart.warps, SLOTS=sums.slots, **constants,
        **sums.apart.options(),
    )  # fmt: skip
    return scores, slots


def new_lists(query: Tensor, shape: Lists, sums: Sums) -> Tensor:
    """Memory for the lists and the pairs of ranks of each program, [programs, entries]."""
    size = sums.slots * shape.rows + 2 ** (sums.log_pairs - 1)
    return query.new_empty(list_programs(query, shape), size, dtype=torch.int64)


def product_key_topk_bytes(query: Tensor, subkeys: Tensor, top_k: int) -> dict[str, int]:
    """What `product_key_topk` reads and writes of each tensor (see `lookup_bytes`).

    Of `lists`, of many tokens, it is a bound. Of `scores` and `slots` it is as much as scores take
    that narrow keys order exactly; others are written once more.
    """
    num_tokens, heads, _ = query.shape
    num_subkeys, half_dim = subkeys.shape[2:]
    per_half = min(top_k, num_subkeys)
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    sizes = (query.element_size(), subkeys.element_size())
    result = 4 * num_tokens * heads * top_k
    few = choose_splits(halves, books, per_half)
    if few is not None:
        moved = split_bytes(few, num_tokens, 2 * heads, num_subkeys, half_dim, sizes)
        return moved | {"scores": result, "slots": result}
    many = choose_lists(query, books, per_half)
    num_pairs = count_pairs(top_k, per_half)
    sums = choose_sums(many, top_k, num_pairs)
    if sums.apart is not None:
        moved = flat_key_topk_bytes(halves, books, per_half)
        # Written by one launch, and read by the next.
        halves_best = moved["scores"]
        lists = combine_bytes_at_most(query, sums.apart, sums, top_k, num_pairs)
        return moved | {
            "halves": 2 * halves_best,
            "scores": halves_best + result,
            "slots": halves_best + result,
            "lists": moved["lists"] + lists,
        }
    moved = select_bytes(many, num_tokens, 2 * heads, num_subkeys, half_dim, sizes)
    # The first half's best wait there, or among the lists.
    waiting = 0 if sums.keep else 2 * 4 * num_tokens * heads * per_half
    rows = triton.cdiv(num_tokens, many.rows) * many.rows * heads
    lists = 2 * rows * list_bytes_at_most(many, num_subkeys, per_half)
    return moved | {
        "scores": waiting + result,
        "slots": waiting + result,
        "lists": lists + combine_bytes_at_most(query, many, sums, top_k, num_pairs),
    }


def combine_bytes_at_most(
    query: Tensor, shape: Lists, sums: Sums, top_k: int, num_pairs: int
) -> int:
    """The most that `pairs.combine` moves of the lists, of all rows."""
    pairs = 2**sums.log_pairs
    # Sorted at the end, and each time that so many were seen that a list may be full.
    room = 2**sums.log_list - 32 - top_k
    sorts = 1 if sums.log_list == sums.log_pairs else 1 + num_pairs // room
    # The halves' best, once in order; then bounds, the pairs of ranks, their scores and sums, by
    # narrow keys and once more by lists; and the best sums.
    a_row = (
        32 * 2**shape.log_top + 80 * (shape.log_top + 2) + 36 * pairs
        + sorts * (sort_bytes_at_most(2**sums.log_list, sums.log_top) + 32) + 56 * 2**sums.log_top
    )  # fmt: skip
    rows = triton.cdiv(query.shape[0], shape.rows) * shape.rows * query.shape[1]
    return rows * a_row + 4 * pairs * list_programs(query, shape)


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        num_tokens: int, num_subkeys: int, top_k: int, dtype: torch.dtype
    ) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        subkeys = torch.empty(4, 2, num_subkeys, 256, dtype=dtype, device="meta")
        return lambda: product_key_topk(query, subkeys, top_k)

    return {
        "product many 512 of 32": call(16384, 512, 32, torch.bfloat16),
        "product many 4096 of 32": call(16384, 4096, 32, torch.bfloat16),
        "product many 512 of 64": call(16384, 512, 64, torch.bfloat16),
        "product many 512 of 128": call(16384, 512, 128, torch.bfloat16),
        "product many 512 of 1000": call(16384, 512, 1000, torch.bfloat16),
        "product many float32": call(16384, 512, 32, torch.float32),
        "product some 512 of 32": call(4096, 512, 32, torch.bfloat16),
        "product few 512 of 32": call(1, 512, 32, torch.bfloat16),
        "product few 512 of 256": call(1, 512, 256, torch.bfloat16),
        "product few float32": call(1, 512, 32, torch.float32),
    }
