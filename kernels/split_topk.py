"""Top k of few queries: a head's keys are split over programs, each of which sorts its own.

Few queries leave no time for bounds and lists: what counts is that many programs read the keys at
once, and that a result is few dependent steps away. So all scores of a stretch are sorted where
they are, in registers. Sorted are int64 that order as scores and their keys should, see
`ordered_pair`; NOTHING is less than all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .entries import bits_of, ordered, ordered_pair
from .launch import Splits

NOTHING: tl.constexpr = tl.constexpr(-0x8000000000000000)


@triton.jit
def pair_score(pair):
    """The score of an `ordered_pair`; NaN of NaN."""
    return ordered(bits_of(pair)).to(tl.float32, bitcast=True)


@triton.jit
def pair_index(pair):
    """The index of an `ordered_pair`."""
    return 0x7FFFFFFF - pair.to(tl.int32)


@triton.jit
def merge_sorted(first, second):
    """The larger half of the entries of two descending [ROWS, TOP], descending."""
    return tl.bitonic_merge(tl.maximum(first, tl.flip(second, 1)), descending=True)


@triton.jit
def score_keys(
    query_ptr, keys_ptr, row_mask, key_mask, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, TILE]; the pointers [ROWS, 1] and [1, TILE] are to the first elements."""
    scores = tl.zeros([ROWS, TILE], tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        query = tl.load(query_ptr + d[None, :], mask=row_mask & (d < D)[None, :], other=0.0)
        keys = tl.load(keys_ptr + d[:, None], mask=key_mask & (d < D)[:, None], other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, scores, input_precision=PRECISION)
    return scores


@triton.jit(do_not_specialize=["num_tokens", "num_keys", "splits"])
def split_topk_kernel(
    query_ptr,  # [T, H, D]
    keys_ptr,  # [H, K, D]
    part_ptr,  # [T, H, splits, TOP], int64
    num_tokens, num_keys, splits, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head and one of `splits` stretches of its keys."""
    head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = token * H + head
    first_key = (split.to(tl.int64) * num_keys // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * num_keys // splits).to(tl.int32)
    best = tl.full([ROWS, TOP], NOTHING, tl.int64)
    for start in tl.range(first_key, end, TILE):
        key = start + tl.arange(0, TILE)[None, :]
        scores = score_keys(
            query_ptr + place * D, keys_ptr + (head.to(tl.int64) * num_keys + key) * D,
            token < num_tokens, key < end, D, BLOCK_D, ROWS, TILE, UPCAST, PRECISION,
        )  # fmt: skip
        pair = ordered_pair(scores.to(tl.int32, bitcast=True), key)
        best = merge_sorted(best, tl.topk(tl.where(key < end, pair, NOTHING), TOP))
    rank = tl.arange(0, TOP)[None, :]
    tl.store(part_ptr + (place * splits + split) * TOP + rank, best, mask=token < num_tokens)


def split_topk(query: Tensor, keys: Tensor, choice: Splits) -> Tensor:
    """The best of each stretch of the keys, [T, H, splits, TOP], as `ordered_pair`."""
    num_tokens, heads, query_dim = query.shape
    shape = (num_tokens, heads, choice.splits, choice.top)
    part = query.new_empty(shape, dtype=torch.int64)
    split_topk_kernel[(triton.cdiv(num_tokens, choice.rows), heads, choice.splits)](
        query, keys, part, num_tokens, keys.shape[-2], choice.splits, H=heads, D=query_dim,
        BLOCK_D=choice.block_d, ROWS=choice.rows, TILE=choice.tile, TOP=choice.top,
        UPCAST=choice.upcast, PRECISION=choice.precision, num_warps=choice.warps,
        num_stages=choice.stages,
    )  # fmt: skip
    return part
