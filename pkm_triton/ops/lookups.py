"""The lookups: exact top-k of product keys and of flat keys, differentiable in their scores.

A score is a product of a query and a key, so its derivatives are gather, scatter and sample, with
the keys of all heads as one table: the query's a gather of the keys chosen, the keys' a scatter of
the queries, and a tangent two samples.

Shapes: T tokens, H heads, k reads a head.
    query [T, H, d_q]; subkeys [H, 2, N, d_q / 2]; keys [H, K, d_q]; scores, slots [T, H, k]
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pkm_triton._checks import MAX_SLOTS, check_flat_key_topk, check_product_key_topk

from . import lookup_operators
from .modes import differentiated_again, recorded, transformed
from .rules import batched, sum_of_tangents
from .table_functions import gather, sample, scatter


class _ProductKeyTopk(Function):
    @staticmethod
    def forward(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return lookup_operators.product_key_topk(query, subkeys, top_k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_scores, _ = grads
        if differentiated_again():
            return *_backward_of_ops(grad_scores, *ctx.saved_tensors), None
        return *lookup_operators.product_key_topk_backward(grad_scores, *ctx.saved_tensors), None


class _ProductKeyTopkWithRules(_ProductKeyTopk):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        return _tangent(ctx, *tangents[:2]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batch(_product_key_topk, info.batch_size, in_dims, *args)


class _FlatKeyTopk(Function):
    @staticmethod
    def forward(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return lookup_operators.flat_key_topk(query, keys, top_k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_scores, _ = grads
        if differentiated_again():
            return *_backward_of_ops(grad_scores, *ctx.saved_tensors), None
        return *lookup_operators.flat_key_topk_backward(grad_scores, *ctx.saved_tensors), None


class _FlatKeyTopkWithRules(_FlatKeyTopk):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        return _tangent(ctx, *tangents[:2]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _batch(_flat_key_topk, info.batch_size, in_dims, *args)


def _product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if transformed():
        return _ProductKeyTopkWithRules.apply(query, subkeys, top_k)
    if recorded(query, subkeys):
        return _ProductKeyTopk.apply(query, subkeys, top_k)
    return lookup_operators.product_key_topk(query, subkeys, top_k)


def _flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if transformed():
        return _FlatKeyTopkWithRules.apply(query, keys, top_k)
    if recorded(query, keys):
        return _FlatKeyTopk.apply(query, keys, top_k)
    return lookup_operators.flat_key_topk(query, keys, top_k)


def product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best of the N² slots of each head's product keys, exactly (paper equation 4).

    A query's halves are scored against two codebooks of N sub-keys; the score of slot i · N + j is
    <first half, subkeys[h, 0, i]> + <second half, subkeys[h, 1, j]>.

    Args:
        query: [..., H, d_q]; float32, bfloat16, float16 or float64.
        subkeys: [H, 2, N, d_q / 2]; likewise, not necessarily of the query's dtype.
        top_k: 1 <= top_k <= N². It may exceed N.

    Returns:
        scores [..., H, top_k], descending, float32 (float64 if an input is float64), and slots
        [..., H, top_k], int32. Differentiable in query and subkeys any number of times, in any
        mode, the slots held fixed; `torch.func.vmap` takes a batch of either in one call.

        Scores are sums of products accumulated in float32 or better, and the selection is exact:
        the scores are, in order, those of the best `top_k` of all slots, and no slot comes twice.
        Among equal scores any slot may come. If a query or the sub-keys it meets hold a NaN, that
        query's scores are all NaN and its slots valid; other queries are untouched. +inf and
        -inf add up to -inf. Same inputs, same bits.

    Raises:
        TypeError: if an argument is no floating tensor, or top_k no integer.
        ValueError: if shapes or devices do not fit, top_k is out of range, or N² >= 2³¹.
    """
    top_k = check_product_key_topk(query, subkeys, top_k)
    if query.ndim == 3:
        return _product_key_topk(query, subkeys, top_k)
    return _with_shape_of(query, _product_key_topk(_rows_of(query), subkeys, top_k))


def flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best of K explicit keys of each head, exactly (paper equation 1, the baseline).

    Args:
        query: [..., H, d_q]; float32, bfloat16, float16 or float64.
        keys: [H, K, d_q]; likewise, not necessarily of the query's dtype.
        top_k: 1 <= top_k <= K.

    Returns:
        scores [..., H, top_k], descending, float32 (float64 if an input is float64), and slots
        [..., H, top_k], int32, with the guarantees of `product_key_topk`, derivatives included.
        Never holds all scores at once. On a CPU the scores are the BLAS library's, whose bits may
        depend on the number of threads for few tokens (5 to 7 were seen to).

    Raises:
        TypeError: if an argument is no floating tensor, or top_k no integer.
        ValueError: if shapes or devices do not fit, top_k is out of range, or K >= 2³¹.
    """
    top_k = check_flat_key_topk(query, keys, top_k)
    if query.ndim == 3:
        return _flat_key_topk(query, keys, top_k)
    return _with_shape_of(query, _flat_key_topk(_rows_of(query), keys, top_k))


def _rows_of(query: Tensor) -> Tensor:
    return query.reshape(math.prod(query.shape[:-2]), *query.shape[-2:])


def _with_shape_of(query: Tensor, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    scores, slots = found
    shape = (*query.shape[:-1], scores.shape[-1])
    return scores.view(shape), slots.view(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, keys, output[1])
    ctx.save_for_forward(query, keys, output[1])


def _rows_of_halves(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A row a query [T, H, d_q] and head, or each half of it, and the keys as one table."""
    return query.reshape(-1, keys.shape[-1]), keys.reshape(-1, keys.shape[-1])


def _places(keys: Tensor, slots: Tensor) -> Tensor:
    """Where in that table the keys of slots [T, H, k] are, a row a query and head, or half."""
    books = torch.arange(math.prod(keys.shape[:-2]), dtype=slots.dtype, device=slots.device)
    num_keys = keys.shape[-2]
    if books.shape[0] * num_keys > MAX_SLOTS:
        raise ValueError(
            f"{books.shape[0]} tables of {num_keys} keys have more than {MAX_SLOTS} rows, the most "
            "that is differentiated twice or in forward mode"
        )
    if keys.ndim == 4:
        slots = torch.stack([slots // num_keys, slots % num_keys], dim=2)
    first = (books * num_keys).view(*keys.shape[:-2], 1)
    return (slots + first).flatten(0, -2)


def _backward_of_ops(
    grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys by operations that are differentiable in turn."""
    rows, table = _rows_of_halves(query, keys)
    places = _places(keys, slots)
    halves = keys.ndim - 2  # 2 of product keys, 1 of flat ones
    grad = grad_scores.unsqueeze(2).expand(-1, -1, halves, -1).reshape(places.shape)
    grad_query = gather(table, places, grad, query.dtype)
    grad_keys = scatter(places, grad, rows, table.shape[0], keys.dtype)
    return grad_query.view(query.shape), grad_keys.view(keys.shape)


def _tangent(ctx: Any, query_t: Tensor | None, keys_t: Tensor | None) -> Tensor:
    """The scores' tangent, of the slots that were found."""
    query, keys, slots = ctx.saved_tensors
    places = _places(keys, slots)
    wide = torch.promote_types(torch.float32, torch.promote_types(query.dtype, keys.dtype))
    rows, table = _rows_of_halves(query, keys)
    tangent = sum_of_tangents(
        None if query_t is None else sample(table, places, _rows_of_halves(query_t, keys)[0], wide),
        None if keys_t is None else sample(_rows_of_halves(query, keys_t)[1], places, rows, wide),
    )
    return tangent.view(*slots.shape[:2], -1, slots.shape[2]).sum(2)


def _batch(
    topk: Any, size: int, in_dims: Any, query: Tensor, keys: Tensor, top_k: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Many queries as more tokens; many keys as more heads."""
    query = batched(query, in_dims[0], size)
    if in_dims[1] is None:
        found = topk(query.flatten(0, 1), keys, top_k)
        scores, slots = (each.unflatten(0, query.shape[:2]) for each in found)
        return (scores, slots), (0, 0)
    keys = keys.movedim(in_dims[1], 0).flatten(0, 1)
    found = topk(query.transpose(0, 1).flatten(1, 2), keys, top_k)
    scores, slots = (each.unflatten(1, (size, -1)) for each in found)
    return (scores, slots), (1, 1)
