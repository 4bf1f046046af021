"""Flat-key top-k: the k best of K explicit keys a head, the paper's baseline (equation 1).

Shapes: T tokens, H heads, K keys a head, k reads a head.
    query, grad_query [T, H, d_q]; keys, grad_keys [H, K, d_q]; scores, slots, grad_scores [T, H, k]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .combine.kernels import sort_kernel
from .combine.plan import choose_combine_shape, options, programs
from .gather_values import gather_values
from .scatter_values import gather_values_backward
from .select.plan import plan_selection, select
from .select.traffic import select_bytes


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
    plan = plan_selection(query, keys, top_k)
    shape = choose_combine_shape(plan, top_k)
    lists, counts = plan.buffers(query)
    for first in plan.turns(num_tokens):
        turn = slice(first, first + plan.tokens)
        select(query[turn], keys, top_k, plan, lists, counts)
        tokens = scores[turn].shape[0]
        sort_kernel[programs(tokens, heads, shape)](
            list_ptr=lists,
            count_ptr=counts,
            scores_ptr=scores[turn],
            slots_ptr=slots[turn],
            num_tokens=tokens,
            top_k=top_k,
            splits=plan.splits,
            slots=plan.slots,
            C=shape,
            **options(shape, 1, query.device),
        )
    return scores, slots


def flat_key_topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `flat_key_topk`'s scores.

    Args:
        grad_scores: [T, H, k].
        query: [T, H, d_q].
        keys: [H, K, d_q].
        slots: [T, H, k], as returned.

    Returns:
        grad_query and grad_keys, of the shapes and dtypes of query and keys.
    """
    num_tokens, heads, width = query.shape
    num_keys, reads = keys.shape[1], slots.shape[2]
    grad_query, grad_keys = query.new_empty(query.shape), keys.new_empty(keys.shape)
    # As many heads in one table as int32 can count the rows of: nearly always all.
    at_a_time = min(heads, (2**31 - 1) // num_keys)
    for first in range(0, heads, at_a_time):
        some = slice(first, first + at_a_time)
        table = keys[some].flatten(0, 1)
        count = table.shape[0] // num_keys
        offsets = torch.arange(count, dtype=slots.dtype, device=slots.device) * num_keys
        slot = (slots[:, some] + offsets[:, None]).view(num_tokens * count, reads)
        grad = grad_scores[:, some].reshape(num_tokens * count, reads)
        rows = query[:, some].reshape(num_tokens * count, width)
        grad_table, _ = gather_values_backward(rows, table, slot, grad, True, False)
        grad_keys[some] = grad_table.view(count, num_keys, width)
        # A gather is in its table's dtype.
        wide = table if table.dtype in (query.dtype, torch.float32) else table.float()
        grad_query[:, some] = gather_values(wide, slot, grad).view(num_tokens, count, width)
    return grad_query, grad_keys


def flat_key_topk_bytes(query: Tensor, keys: Tensor, top_k: int) -> dict[str, int]:
    """What `flat_key_topk` reads and writes of each tensor; of the lists the least."""
    moved = select_bytes(query, keys, top_k, plan_selection(query, keys, top_k))
    result = 4 * query.shape[0] * query.shape[1] * top_k
    return moved | {"scores": result, "slots": result}


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
