"""Flat-key top-k: the k best of K explicit keys a head, the paper's baseline (equation 1).

Shapes: T tokens, H heads, K keys a head, k reads a head.
    query [T, H, d_q]; keys [H, K, d_q]; scores, slots [T, H, k]
"""

import torch
from torch import Tensor

from .chunks import token_chunks
from .gather_values import gather_values
from .scatter_values import gather_values_backward
from .topk import matmul_full_float32, scoring_dtype, topk_last_dim

# Scores are made for this many keys at a time, so that a chunk of tokens is tall enough for the
# matrix product to run at full speed.
KEYS_AT_A_TIME = 1 << 14


def flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` keys of highest inner product, exactly (paper equation 1).

    Args:
        query: [T, H, d_q].
        keys: [H, K, d_q].
        top_k: 1 <= top_k <= K.

    Returns:
        scores [T, H, top_k], descending, float32 (float64 if an input is), and slots
        [T, H, top_k], int32. A NaN among a query's scores makes all its returned scores NaN.
    """
    num_tokens, heads, _ = query.shape
    num_keys = keys.shape[1]
    dtype = scoring_dtype(query, keys)
    scores = query.new_empty(num_tokens, heads, top_k, dtype=dtype)
    slots = query.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    width = min(num_keys, max(KEYS_AT_A_TIME, 4 * top_k))
    for head in range(heads):
        for chunk in token_chunks(num_tokens, width):
            rows = query[chunk, head].to(dtype)
            best = rows.new_empty(rows.shape[0], 0)
            index = slots.new_empty(rows.shape[0], 0, dtype=torch.int64)
            for start in range(0, num_keys, width):
                block = keys[head, start : start + width].to(dtype)
                block_scores = matmul_full_float32(rows, block.T)
                value, place = topk_last_dim(block_scores, min(top_k, block.shape[0]))
                best = torch.cat([best, value], dim=-1)
                index = torch.cat([index, place + start], dim=-1)
                best, kept = best.topk(min(top_k, best.shape[-1]), dim=-1)
                index = index.gather(-1, kept)
            scores[chunk, head] = best.masked_fill(best[:, :1].isnan(), torch.nan)
            slots[chunk, head] = index.to(torch.int32)
    return scores, slots


def flat_key_topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `flat_key_topk`'s scores: a gather and a scatter over the keys as a table.

    Args:
        grad_scores: [T, H, k].
        query: [T, H, d_q].
        keys: [H, K, d_q].
        slots: [T, H, k], as returned.

    Returns:
        grad_query and grad_keys, of the shapes and dtypes of query and keys.
    """
    dtype = scoring_dtype(query, keys)
    grad_query, grad_keys = torch.empty_like(query), torch.empty_like(keys)
    for head in range(query.shape[1]):
        table, slot = keys[head].to(dtype), slots[:, head].contiguous()
        rows, grad = query[:, head].to(dtype).contiguous(), grad_scores[:, head].to(dtype)
        grad_query[:, head] = gather_values(table, slot, grad)
        grad_keys[head] = gather_values_backward(rows, table, slot, grad, True, False)[0]
    return grad_query, grad_keys
