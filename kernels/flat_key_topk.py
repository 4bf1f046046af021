"""Flat-key top-k: the k best of K explicit keys a head, the paper's baseline (equation 1).

Shapes: T tokens, H heads, K keys a head, k reads a head.
    query [T, H, d_q]; keys [H, K, d_q]; scores, slots [T, H, k]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .entries import bits_of
from .float32_products import split_keys, split_keys_bytes
from .launch import choose_lists, choose_splits, list_programs, tile_stride
from .lists import store_best
from .lookup_bytes import list_bytes_at_most, select_bytes, split_bytes
from .selection import select
from .split_topk import NOTHING, pair_index, pair_score, split_topk


@triton.jit(do_not_specialize=["num_tokens"])
def flat_key_topk_kernel(
    query_ptr,  # [T, H, D]
    keys_ptr,  # [H, K, D], or [H, K, 2, WIDTH] in parts
    units_ptr,  # [H, K], of parts
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    list_ptr,  # [programs, SLOTS, ROWS], entries
    num_tokens, num_keys, stride, TOP_K: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WARPS: tl.constexpr,
    STAGES: tl.constexpr, SLOTS: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
    SETS: tl.constexpr, SAMPLE: tl.constexpr, ROUNDS: tl.constexpr, FIRST_CUT: tl.constexpr,
    GROWTH: tl.constexpr, SPECULATE: tl.constexpr, SPREAD: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head at a time, and its lists."""
    list_ptr += tl.program_id(0).to(tl.int64) * (SLOTS * ROWS)
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
        first_key = tl.cast(head, tl.int64) * num_keys
        if PRECISION == "float16x3":
            keys = (keys_ptr, first_key, units_ptr)
        else:
            keys = (keys_ptr, first_key)
        select(
            query_ptr + first * D, H * D, num_rows, keys, list_ptr, 0, num_keys, stride, TOP_K, D,
            ROWS, TILE, BLOCK_D, WARPS, STAGES, LOG_LIST, LOG_TOP, SETS, SAMPLE, ROUNDS, FIRST_CUT,
            GROWTH, SPECULATE, SPREAD, FIT, UPCAST, PRECISION,
        )  # fmt: skip
        store_best(
            list_ptr, scores_ptr, slots_ptr, first * TOP_K, num_rows, H * TOP_K, TOP_K, ROWS,
            WARPS, LOG_TOP,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    part_ptr,  # [T * H, splits, TOP], int64
    scores_ptr,  # [T * H, k]
    slots_ptr,  # [T * H, k]
    splits, TOP_K: tl.constexpr, TOP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program owns one token and head: it merges the best of all stretches."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SIZE)
    mask = place < splits * TOP
    best = tl.topk(tl.load(part_ptr + row * splits * TOP + place, mask=mask, other=NOTHING), TOP)
    rank = tl.arange(0, TOP)
    # NaN is the best of all, and makes NaN of them all.
    spoilt = tl.max(bits_of(best), 0) == 0x7FFFFFFF
    place = row * TOP_K + rank
    score = tl.where(spoilt, float("nan"), pair_score(best))
    tl.store(scores_ptr + place, score, mask=rank < TOP_K)
    tl.store(slots_ptr + place, pair_index(best), mask=rank < TOP_K)


def flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of highest inner product, exactly (paper equation 1).

    Args:
        query: [T, H, d_q].
        keys: [H, K, d_q].
        top_k: 1 <= top_k <= K.

    Returns:
        scores [T, H, top_k], float32, descending, and slots [T, H, top_k], int32. A NaN among a
        query's scores makes all its returned scores NaN.
    """
    num_tokens, heads, query_dim = query.shape
    num_keys = keys.shape[1]
    scores = query.new_empty(num_tokens, heads, top_k, dtype=torch.float32)
    slots = query.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    if num_tokens == 0:
        return scores, slots
    few = choose_splits(query, keys, top_k)
    if few is not None:
        part = split_topk(query, keys, few)
        merge_splits_kernel[(num_tokens * heads,)](
            part, scores, slots, few.splits, TOP_K=top_k, TOP=few.top, SIZE=few.merged,
            num_warps=few.merge_warps,
        )  # fmt: skip
        return scores, slots
    many = choose_lists(query, keys, top_k)
    keys, units = split_keys(keys) if many.in_parts else (keys, None)
    programs = list_programs(query, many)
    slots_each = 2**many.log_list + 1 + many.spare
    lists = query.new_empty(programs, slots_each, many.rows, dtype=torch.int64)
    flat_key_topk_kernel[(programs,)](
        query, keys, units, scores, slots, lists, num_tokens, num_keys,
        tile_stride(num_keys, many.tile), TOP_K=top_k, H=heads, D=query_dim, SLOTS=slots_each,
        **many.constants(), **many.options(),
    )  # fmt: skip
    return scores, slots


def flat_key_topk_bytes(query: Tensor, keys: Tensor, top_k: int) -> dict[str, int]:
    """What `flat_key_topk` reads and writes of each tensor; of `lists` at most."""
    num_tokens, heads, query_dim = query.shape
    num_keys = keys.shape[1]
    sizes = (query.element_size(), keys.element_size())
    result = 4 * num_tokens * heads * top_k
    few = choose_splits(query, keys, top_k)
    if few is not None:
        moved = split_bytes(few, num_tokens, heads, num_keys, query_dim, sizes)
        return moved | {"scores": result, "slots": result}
    many = choose_lists(query, keys, top_k)
    moved = select_bytes(many, num_tokens, heads, num_keys, query_dim, sizes)
    if many.in_parts:
        of_split = split_keys_bytes(heads * num_keys, query_dim, sizes[1])
        moved = {name: moved.get(name, 0) + of_split.get(name, 0) for name in moved | of_split}
    a_row = list_bytes_at_most(many, num_keys, top_k) + 8 * (top_k + 1)
    rows = triton.cdiv(num_tokens, many.rows) * many.rows * heads
    return moved | {"scores": result, "slots": result, "lists": rows * a_row}


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(num_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        keys = torch.empty(4, 1 << 16, 512, dtype=dtype, device="meta")
        return lambda: flat_key_topk(query, keys, 32)

    return {
        "flat many bfloat16": call(16384, torch.bfloat16),
        "flat many float32": call(16384, torch.float32),
        "flat few bfloat16": call(1, torch.bfloat16),
    }
