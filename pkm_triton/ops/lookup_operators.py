"""The operators of the lookups, which run either backend.

Shapes: T tokens, H heads, k reads a head.
    query [T, H, d_q]; subkeys [H, 2, N, d_q / 2]; keys [H, K, d_q];
    scores, grad_scores, slots [T, H, k]
"""

import torch
from torch import Tensor

from pkm_triton._backend import implementation

from .registry import register


def _fake_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (query.dtype, keys.dtype)
    shape = (*query.shape[:2], top_k)
    scores = query.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    return scores, query.new_empty(shape, dtype=torch.int32)


def _fake_topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _run_product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return _fake_topk(query, subkeys, top_k)
    run = implementation(query, subkeys).product_key_topk
    return run(query.contiguous(), subkeys.contiguous(), top_k)


def _run_product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, subkeys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return query.new_zeros(query.shape), subkeys.new_zeros(subkeys.shape)
    run = implementation(query, subkeys).product_key_topk_backward
    return run(
        grad_scores.contiguous(), query.contiguous(), subkeys.contiguous(), slots.contiguous()
    )


def _run_flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return _fake_topk(query, keys, top_k)
    run = implementation(query, keys).flat_key_topk
    return run(query.contiguous(), keys.contiguous(), top_k)


def _run_flat_key_topk_backward(
    grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    if query.shape[0] == 0:
        return query.new_zeros(query.shape), keys.new_zeros(keys.shape)
    run = implementation(query, keys).flat_key_topk_backward
    return run(grad_scores.contiguous(), query.contiguous(), keys.contiguous(), slots.contiguous())


product_key_topk = register(
    "product_key_topk(Tensor query, Tensor subkeys, int top_k) -> (Tensor, Tensor)",
    _run_product_key_topk,
    _fake_topk,
)
product_key_topk_backward = register(
    "product_key_topk_backward(Tensor grad_scores, Tensor query, Tensor subkeys, Tensor slots)"
    " -> (Tensor, Tensor)",
    _run_product_key_topk_backward,
    _fake_topk_backward,
)
flat_key_topk = register(
    "flat_key_topk(Tensor query, Tensor keys, int top_k) -> (Tensor, Tensor)",
    _run_flat_key_topk,
    _fake_topk,
)
flat_key_topk_backward = register(
    "flat_key_topk_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor slots)"
    " -> (Tensor, Tensor)",
    _run_flat_key_topk_backward,
    _fake_topk_backward,
)
