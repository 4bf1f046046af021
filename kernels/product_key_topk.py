"""Product-key top-k: the k best of N² slots from two codebooks of N sub-keys (paper 3.1).

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    query [T, H, 2 D]; subkeys [H, 2, N, D]; scores, slots [T, H, k]; slot = i · N + j
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .flat_key_topk import select_parts
from .launch import MAX_PAIRS, choose_lookup, log2_ceil, programs_at_once
from .lists import merge_lists
from .pairs import combine, store_rank_pairs
from .selection import select


@triton.jit(do_not_specialize=["num_tokens"])
def product_key_topk_kernel(
    query_ptr,  # [T, H, 2 D]
    subkeys_ptr,  # [H, 2, N, D]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    list_ptr,  # [programs, ...], entries
    num_tokens, num_subkeys, top_k,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WARPS: tl.constexpr, LOG_LIST: tl.constexpr,
    LOG_PAIRS: tl.constexpr, LOG_SHORT: tl.constexpr, LOG_HALF_TOP: tl.constexpr,
    LOG_TOP: tl.constexpr, FULL: tl.constexpr, SAMPLE: tl.constexpr,
    ROUNDS: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head at a time, and its lists."""
    # After the list of a row come its head and the first half's result.
    FIRST: tl.constexpr = ROWS * (2**LOG_LIST + 1)
    PAIRS: tl.constexpr = FIRST + ROWS * 2**LOG_HALF_TOP
    list_ptr += tl.program_id(0).to(tl.int64) * (PAIRS + 2**LOG_PAIRS)
    store_rank_pairs(list_ptr + PAIRS, top_k, tl.minimum(top_k, num_subkeys), LOG_PAIRS)
    d = tl.arange(0, BLOCK_D)[None, :]
    for block in tl.range(
        tl.program_id(0),
        tl.cdiv(num_tokens, ROWS) * H,
        tl.num_programs(0),
        num_stages=1,
        disable_licm=True,
    ):
        head = block % H
        token = block // H * ROWS
        row = tl.arange(0, ROWS)[:, None]
        for half in tl.range(2, num_stages=1, disable_licm=True):
            # 64 bits for where the tile starts; inside it, 32 are enough.
            first_ptr = query_ptr + (tl.cast(token, tl.int64) * H + head) * (2 * D) + half * D
            rows_ptr = first_ptr + (row * (2 * D * H) + d)
            keys = subkeys_ptr + tl.cast(head * 2 + half, tl.int64) * num_subkeys * D
            select(
                rows_ptr, num_tokens - token, keys, list_ptr,
                list_ptr + (1 - half) * FIRST, 0, num_subkeys, tl.minimum(top_k, num_subkeys), D,
                ROWS, TILE, BLOCK_D, WARPS, LOG_LIST, LOG_SHORT, LOG_HALF_TOP, FULL, SAMPLE, ROUNDS,
                EVEN, UPCAST, PRECISION,
            )  # fmt: skip
        combine(
            list_ptr + FIRST, list_ptr, list_ptr + PAIRS, scores_ptr, slots_ptr, token, head,
            num_tokens, num_subkeys, top_k, H, ROWS, WARPS, LOG_PAIRS, LOG_HALF_TOP, LOG_TOP,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def merge_halves_kernel(
    part_ptr,  # [blocks of T, H, 2, 2 ** LOG_MERGE + 1, ROWS], entries
    pairs_ptr,  # [programs, 2 ** LOG_PAIRS]
    scores_ptr,  # [T, H, k]
    slots_ptr,  # [T, H, k]
    num_tokens, num_subkeys, splits, top_k, H: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, LOG_MERGE: tl.constexpr, LOG_PAIRS: tl.constexpr,
    LOG_HALF_TOP: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """A program owns ROWS tokens of one head: it merges both halves' stretches and adds them."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    program = (block * H + head).to(tl.int64)
    AREA: tl.constexpr = (2**LOG_MERGE + 1) * ROWS
    part_ptr += program * (2 * AREA)
    pairs_ptr += program * 2**LOG_PAIRS
    per_half = tl.minimum(top_k, num_subkeys)
    store_rank_pairs(pairs_ptr, top_k, per_half, LOG_PAIRS)
    for half in tl.range(2, num_stages=1, disable_licm=True):
        merge_lists(part_ptr + half * AREA, splits, per_half, ROWS, WARPS, LOG_MERGE, LOG_HALF_TOP)
    combine(
        part_ptr, part_ptr + AREA, pairs_ptr, scores_ptr, slots_ptr, block * ROWS,
        head, num_tokens, num_subkeys, top_k, H, ROWS, WARPS, LOG_PAIRS, LOG_HALF_TOP, LOG_TOP,
    )  # fmt: skip


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
    num_pairs = sum(min(top_k // a, per_half) for a in range(1, per_half + 1))
    if num_pairs > MAX_PAIRS:
        raise ValueError(
            f"top_k is {top_k} of {num_subkeys}² slots: {num_pairs} pairs of ranks to combine, but "
            f"the kernels take at most {MAX_PAIRS}"
        )
    halves = query.view(num_tokens, 2 * heads, half_dim)
    choice = choose_lookup(halves, subkeys, per_half)
    log_top = max(4, log2_ceil(top_k))
    log_pairs = max(log_top, log2_ceil(num_pairs))
    blocks = triton.cdiv(num_tokens, choice.rows)
    if choice.rows > 16:
        programs = min(programs_at_once(query.device), blocks * heads)
        size = (2**choice.log_list + 1 + 2**choice.log_top) * choice.rows + 2**log_pairs
        lists = query.new_empty(programs, size, dtype=torch.int64)
        constants = choice.select_constants()
        constants["LOG_HALF_TOP"] = constants["LOG_TOP"]
        constants["LOG_TOP"] = log_top
        product_key_topk_kernel[(programs,)](
            query, subkeys, scores, slots, lists, num_tokens, num_subkeys, top_k,
            H=heads, D=half_dim, LOG_PAIRS=log_pairs, **constants, **choice.options(),
        )  # fmt: skip
        return scores, slots
    tables = subkeys.view(2 * heads, num_subkeys, half_dim)
    part = select_parts(halves, tables, per_half, choice)
    pairs = query.new_empty(blocks * heads, 2**log_pairs, dtype=torch.int64)
    merge_halves_kernel[(blocks, heads)](
        part, pairs, scores, slots, num_tokens, num_subkeys, choice.splits, top_k,
        H=heads, ROWS=choice.rows, WARPS=choice.warps, LOG_MERGE=choice.log_merge,
        LOG_PAIRS=log_pairs, LOG_HALF_TOP=choice.log_top, LOG_TOP=log_top, **choice.options(),
    )  # fmt: skip
    return scores, slots


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
        "product many float32": call(16384, 512, 32, torch.float32),
        "product few 512 of 32": call(1, 512, 32, torch.bfloat16),
        "product few float32": call(1, 512, 32, torch.float32),
    }
