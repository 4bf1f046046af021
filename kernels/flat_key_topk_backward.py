"""Gradients of the flat-key top-k: a gather and a scatter with all heads' keys as one table.

Shapes: T tokens, H heads, K keys a head, k reads a head.
    grad_scores, slots [T, H, k]; query, grad_query [T, H, d_q]; keys, grad_keys [H, K, d_q]
"""

import torch
from torch import Tensor

from .gather_values import gather_values
from .scatter_values import gather_values_backward


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
