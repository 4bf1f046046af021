"""Flat-key top-k: the k best of K explicit keys a head, the paper's baseline (equation 1).

Shapes: T tokens, H heads, K keys a head, k reads a head.
    query [T, H, d_q]; keys [H, K, d_q]; scores, slots [T, H, k]
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Lookup, choose_lookup
from .lists import merge_lists, score_of
from .selection import select


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def select_kernel(
    query_ptr,  # [T, H, D]
    keys_ptr,  # [H, K, D]
    part_ptr,  # [blocks of T, H, 2 ** LOG_MERGE + 1, ROWS], entries
    list_ptr,  # [programs, 2 ** LOG_LIST + 1, ROWS], entries
    num_tokens, num_keys, splits, top_k,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WARPS: tl.constexpr, LOG_LIST: tl.constexpr, LOG_SHORT: tl.constexpr,
    LOG_TOP: tl.constexpr, LOG_MERGE: tl.constexpr, FULL: tl.constexpr, SAMPLE: tl.constexpr,
    ROUNDS: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head and one of `splits` stretches of its keys."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    program = (block * H + head).to(tl.int64)
    part_ptr += program * ((2**LOG_MERGE + 1) * ROWS) + split * top_k * ROWS
    list_ptr += (program * splits + split) * ((2**LOG_LIST + 1) * ROWS)
    token = block * ROWS
    row = tl.arange(0, ROWS)[:, None]
    # 64 bits for where the tile starts; inside it, 32 are enough.
    rows_ptr = query_ptr + (token.to(tl.int64) * H + head) * D
    rows_ptr += row * (H * D) + tl.arange(0, BLOCK_D)[None, :]
    first_key = (split.to(tl.int64) * num_keys // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * num_keys // splits).to(tl.int32)
    select(
        rows_ptr, num_tokens - token,
        keys_ptr + head.to(tl.int64) * num_keys * D, list_ptr, part_ptr, first_key, end, top_k,
        D, ROWS, TILE, BLOCK_D, WARPS, LOG_LIST, LOG_SHORT, LOG_TOP, FULL, SAMPLE,
        ROUNDS, EVEN, UPCAST, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def merge_kernel(
    part_ptr,  # [blocks of T, H, 2 ** LOG_MERGE + 1, ROWS], entries
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    num_tokens, splits, top_k, H: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_MERGE: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head: it merges the stretches and writes the result."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    part_ptr += (block * H + head).to(tl.int64) * ((2**LOG_MERGE + 1) * ROWS)
    merge_lists(part_ptr, splits, top_k, ROWS, WARPS, LOG_MERGE, LOG_TOP)
    rank = tl.arange(0, 2**LOG_TOP)[:, None]
    row = tl.arange(0, ROWS)[None, :]
    token = block.to(tl.int64) * ROWS + row
    mask = (rank < top_k) & (token < num_tokens)
    best = tl.load(part_ptr + row)
    entry = tl.load(part_ptr + rank * ROWS + row, mask=rank < top_k, other=0)
    # One NaN among a row's scores came first, and makes NaN of them all.
    score = tl.where(score_of(best) != score_of(best), float("nan"), score_of(entry))
    place = (token * H + head) * top_k + rank
    tl.store(scores_ptr + place, score, mask=mask)
    tl.store(slots_ptr + place, (entry & 0x7FFFFFFF).to(tl.int32), mask=mask)


def select_parts(query: Tensor, keys: Tensor, top_k: int, choice: Lookup) -> Tensor:
    """The top_k best of each stretch of the keys, as the lists that `merge_kernel` reads."""
    num_tokens, heads, query_dim = query.shape
    blocks = triton.cdiv(num_tokens, choice.rows)
    areas = (blocks * heads, blocks * heads * choice.splits)
    part = query.new_empty(areas[0], 2**choice.log_merge + 1, choice.rows, dtype=torch.int64)
    lists = query.new_empty(areas[1], 2**choice.log_list + 1, choice.rows, dtype=torch.int64)
    select_kernel[(blocks, heads, choice.splits)](
        query, keys, part, lists, num_tokens, keys.shape[1], choice.splits, top_k,
        H=heads, D=query_dim, LOG_MERGE=choice.log_merge, **choice.select_constants(),
        **choice.options(),
    )  # fmt: skip
    return part


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
    num_tokens, heads, _ = query.shape
    scores = query.new_empty(num_tokens, heads, top_k, dtype=torch.float32)
    slots = query.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    if num_tokens == 0:
        return scores, slots
    choice = choose_lookup(query, keys, top_k)
    part = select_parts(query, keys, top_k, choice)
    merge_kernel[(triton.cdiv(num_tokens, choice.rows), heads)](
        part, scores, slots, num_tokens, choice.splits, top_k, H=heads, ROWS=choice.rows,
        WARPS=choice.warps, LOG_MERGE=choice.log_merge, LOG_TOP=choice.log_top,
        **choice.options(),
    )  # fmt: skip
    return scores, slots


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(num_tokens: int, dtype: torch.dtype) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        keys = torch.empty(4, 1 << 16, 512, dtype=dtype, device="meta")
        return lambda: flat_key_topk(query, keys, 32)

    return {
        "flat many bfloat16": call(16384, torch.bfloat16),
        "flat few bfloat16": call(1, torch.bfloat16),
    }
