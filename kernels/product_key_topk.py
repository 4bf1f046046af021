"""Product-key top-k: the k best of N² slots from two codebooks of N sub-keys (paper 3.1).

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    query [T, H, 2 D]; subkeys [H, 2, N, D]; scores, slots [T, H, k]; slot = i · N + j
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .combine.kernels import combine_kernel
from .combine.plan import choose_shape, options, programs, rank_pairs
from .select.plan import plan_selection, select
from .select.traffic import select_bytes


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
    # To what selects each half is a head.
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    per_half = min(top_k, num_subkeys)
    plan = plan_selection(halves, books, per_half)
    shape = choose_shape(plan, top_k)
    if shape.in_turns:
        # The sorted halves cannot take the place of candidates that are read again.
        plan = plan_selection(halves, books, per_half, spare=per_half)
    pairs = rank_pairs(top_k, num_subkeys, query.device)
    lists, counts = plan.buffers(halves)
    for first in plan.turns(num_tokens):
        turn = slice(first, first + plan.tokens)
        select(halves[turn], books, per_half, plan, lists, counts)
        tokens = scores[turn].shape[0]
        combine_kernel[programs(tokens, heads, shape)](
            list_ptr=lists,
            count_ptr=counts,
            pairs_ptr=pairs,
            scores_ptr=scores[turn],
            slots_ptr=slots[turn],
            num_tokens=tokens,
            num_subkeys=num_subkeys,
            top_k=top_k,
            num_pairs=pairs.numel(),
            splits=plan.splits,
            slots=plan.slots,
            sorted_at=plan.slots - per_half if shape.in_turns else 0,
            C=shape,
            **options(shape, halves=2),
        )
    return scores, slots


def product_key_topk_bytes(query: Tensor, subkeys: Tensor, top_k: int) -> dict[str, int]:
    """What `product_key_topk` reads and writes of each tensor; of the lists the least."""
    num_tokens, heads, _ = query.shape
    num_subkeys, half_dim = subkeys.shape[2:]
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    per_half = min(top_k, num_subkeys)
    moved = select_bytes(halves, books, per_half, plan_selection(halves, books, per_half))
    result = 4 * num_tokens * heads * top_k
    return moved | {"scores": result, "slots": result}


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        num_tokens: int, num_subkeys: int, top_k: int, dtype: torch.dtype
    ) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        subkeys = torch.empty(4, 2, num_subkeys, 256, dtype=dtype, device="meta")
        return lambda: product_key_topk(query, subkeys, top_k)

    return {
        "product many of 32": call(16384, 1024, 32, torch.bfloat16),
        "product many of 64": call(16384, 1024, 64, torch.bfloat16),
        "product many float32": call(16384, 1024, 32, torch.float32),
        "product some of 32": call(1024, 1024, 32, torch.bfloat16),
        "product few of 32": call(1, 1024, 32, torch.bfloat16),
        "product few of 256": call(1, 1024, 256, torch.bfloat16),
        "product few float32": call(1, 1024, 32, torch.float32),
    }
