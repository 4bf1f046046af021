"""The public ops: check the arguments, choose a backend, differentiate.

Behind each public function is one operator registered with torch.library, so that
`torch.compile` and `torch.export` see a single node, with its gradient and its shapes. The
public functions are plain Python: they check, flatten the leading dimensions and call it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import implementation
from ._checks import (
    SparseGrad,
    check_flat_key_topk,
    check_gather_values,
    check_product_key_topk,
    check_slot_range,
    check_sparse_grad,
    int32_slots,
)
from ._operators import refuse_second_gradient, register, register_with_gradient
from .gradients import FactoredGradient, coalesced_gradient


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
        [..., H, top_k], int32. Differentiable in query and subkeys, once.

        Scores are sums of products accumulated in float32 or better, and the selection is exact:
        the scores are, in order, those of the best `top_k` of all slots, and no slot comes twice.
        Among equal scores any slot may come. If a query or the sub-keys it meets hold a NaN, that
        query's scores are all NaN and its slots valid; other queries are untouched. +inf and
        -inf add up to -inf. Same inputs, same bits.

    Raises:
        TypeError: if an argument is no floating tensor, or top_k no integer.
        ValueError: if shapes or devices do not fit, top_k is out of range, or N² >= 2³¹.
    """
    return _product_key_topk(query, subkeys, check_product_key_topk(query, subkeys, top_k))


def flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` best of K explicit keys of each head, exactly (paper equation 1, the baseline).

    Args:
        query: [..., H, d_q]; float32, bfloat16, float16 or float64.
        keys: [H, K, d_q]; likewise, not necessarily of the query's dtype.
        top_k: 1 <= top_k <= K.

    Returns:
        scores [..., H, top_k], descending, float32 (float64 if an input is float64), and slots
        [..., H, top_k], int32, with the guarantees of `product_key_topk`. Never holds all scores
        at once. Differentiable in query and keys, once.

    Raises:
        TypeError: if an argument is no floating tensor, or top_k no integer.
        ValueError: if shapes or devices do not fit, top_k is out of range, or K >= 2³¹.
    """
    return _flat_key_topk(query, keys, check_flat_key_topk(query, keys, top_k))


def gather_values(
    values: Tensor, slots: Tensor, weights: Tensor, sparse_grad: SparseGrad = False
) -> Tensor:
    """The weighted sum of the rows of a table that each token reads (paper equation 3).

    Args:
        values: [K, d_v]; float32, bfloat16, float16 or float64.
        slots: [..., R], int32 or int64, each in [0, K); a slot may come twice.
        weights: [..., R], any of the dtypes of values.
        sparse_grad: what the gradient of values is. False: a dense [K, d_v]. True: a coalesced
            sparse COO tensor of the rows that were read; for `optim.SparseAdam`,
            `torch.optim.SparseAdam` and its like. `DistributedDataParallel` averages neither this
            nor the next form: see `distributed.data_parallel`. "factored": a `FactoredGradient`,
            from which `optim.SparseAdam`, and nothing else, makes its step without the rows'
            gradient ever being stored; under `torch.compile` it breaks the graph.

    Returns:
        [..., d_v], in the dtype of values, accumulated in float32 (float64 for float64).
        Differentiable in values and weights, once. Neither pass forms [..., R, d_v]. Same
        inputs, same bits, in both passes.

    Raises:
        TypeError: if values or weights is no floating tensor, or slots no integer tensor.
        ValueError: if shapes or devices do not fit, or a slot on the CPU is out of range. On a
            GPU the range is not checked, since that would wait for the device: there such a
            slot reads nothing, and makes its token's output NaN.
    """
    check_gather_values(values, slots, weights)
    check_sparse_grad(sparse_grad)
    op: Any
    if not _wants_gradient(values, weights):
        op = _gather_values
    elif sparse_grad == "factored":
        op = _gather_values_with_factored_gradient
        if torch.compiler.is_compiling():
            # A compiled graph cannot return such a gradient.
            op = torch.compiler.disable(op)
    elif sparse_grad:
        op = _gather_values_with_sparse_gradient
    else:
        op = _gather_values_with_gradient
    if slots.ndim == 2:
        return op(values, slots, weights)
    rows = (math.prod(slots.shape[:-1]), slots.shape[-1])
    out = op(values, slots.reshape(rows), weights.reshape(rows))
    return out.view(*slots.shape[:-1], values.shape[1])


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _empty_topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (query.dtype, keys.dtype)
    shape = (*query.shape[:2], top_k)
    scores = query.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    return scores, query.new_empty(shape, dtype=torch.int32)


def _topk(name: str) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """A lookup that both backends call `name`: its operators, and its gradient.

    query [T, H, d_q]; keys as the lookup has them; scores, slots [T, H, k].
    """

    def run(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        if query.shape[0] == 0:
            return _empty_topk(query, keys, top_k)
        twin = getattr(implementation(query, keys), name)
        return twin(query.contiguous(), keys.contiguous(), top_k)

    def run_backward(
        grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        if query.shape[0] == 0:
            return query.new_zeros(query.shape), keys.new_zeros(keys.shape)
        twin = getattr(implementation(query, keys), f"{name}_backward")
        return twin(
            grad_scores.contiguous(), query.contiguous(), keys.contiguous(), slots.contiguous()
        )

    def fake_backward(
        grad_scores: Tensor, query: Tensor, keys: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        return query.new_empty(query.shape), keys.new_empty(keys.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])

    def backward(ctx: Any, grad_scores: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        return *op_backward(grad_scores, *ctx.saved_tensors), None

    arguments = "(Tensor query, Tensor keys, int top_k) -> (Tensor, Tensor)"
    op = register(f"{name}{arguments}", run, _empty_topk)
    op_with_gradient = register_with_gradient(
        f"{name}_with_gradient{arguments}", run, _empty_topk, save, backward
    )
    op_backward = register(
        f"{name}_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor slots)"
        " -> (Tensor, Tensor)",
        run_backward,
        fake_backward,
    )
    refuse_second_gradient(op_backward)

    def topk(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        chosen = op_with_gradient if _wants_gradient(query, keys) else op
        if query.ndim == 3:
            return chosen(query, keys, top_k)
        rows = query.reshape(math.prod(query.shape[:-2]), *query.shape[-2:])
        scores, slots = chosen(rows, keys, top_k)
        shape = (*query.shape[:-1], top_k)
        return scores.view(shape), slots.view(shape)

    return topk


def _run_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    if slots.numel() == 0:
        return values.new_zeros(slots.shape[0], values.shape[1])
    twin = implementation(values, weights)
    if twin is reference and slots.is_cpu and slots.dtype == torch.int32:
        # torch looks at every slot as it reads, so that a pass of our own is not needed.
        try:
            return twin.gather_values(values.contiguous(), slots.contiguous(), weights.contiguous())
        except RuntimeError:
            check_slot_range(slots, values.shape[0])
            raise
    slots = int32_slots(slots, values.shape[0])
    return twin.gather_values(values.contiguous(), slots, weights.contiguous())


def _fake_gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return values.new_empty(slots.shape[0], values.shape[1])


def _run_gather_backward(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    slots = int32_slots(slots, values.shape[0])
    if slots.numel() == 0:
        return (
            values.new_zeros(values.shape if needs_values else 0),
            weights.new_zeros(weights.shape if needs_weights else 0),
        )
    return implementation(values, weights).gather_values_backward(
        grad_output.contiguous(),
        values.contiguous(),
        slots,
        weights.contiguous(),
        needs_values,
        needs_weights,
    )


def _fake_gather_backward(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    return (
        values.new_empty(values.shape if needs_values else 0),
        weights.new_empty(weights.shape if needs_weights else 0),
    )


def _run_gather_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    slots = int32_slots(slots, values.shape[0])
    if slots.numel() == 0:
        rows = slots.new_empty(0, dtype=torch.int64)
        grad_weights = weights.new_zeros(weights.shape if needs_weights else 0)
        return rows, values.new_empty(0, values.shape[1]), grad_weights
    return implementation(values, weights).gather_values_backward_sparse(
        grad_output.contiguous(), values.contiguous(), slots, weights.contiguous(), needs_weights
    )


def _fake_gather_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # How many rows were read depends on the data.
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        slots.new_empty(num_rows, dtype=torch.int64),
        values.new_empty(num_rows, values.shape[1]),
        weights.new_empty(weights.shape if needs_weights else 0),
    )


def _save_gather(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gather_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    needs_values, _, needs_weights = ctx.needs_input_grad
    grad_values, grad_weights = _gather_values_backward(
        grad_output, *ctx.saved_tensors, needs_values, needs_weights
    )
    return grad_values if needs_values else None, None, grad_weights if needs_weights else None


def _gather_backward_sparse(
    ctx: Any, grad_output: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    needs_values, _, needs_weights = ctx.needs_input_grad
    if not needs_values:
        return _gather_backward(ctx, grad_output)
    values, slots, weights = ctx.saved_tensors
    rows, grad_rows, grad_weights = _gather_values_backward_sparse(
        grad_output, values, slots, weights, needs_weights
    )
    grad_values = coalesced_gradient(rows, grad_rows, values)
    return grad_values, None, grad_weights if needs_weights else None


def _gather_backward_factored(
    ctx: Any, grad_output: Tensor
) -> tuple[Tensor | None, None, Tensor | None]:
    needs_values, _, needs_weights = ctx.needs_input_grad
    values, slots, weights = ctx.saved_tensors
    _, grad_weights = _gather_values_backward(
        grad_output, values, slots, weights, False, needs_weights
    )
    grad_values = None
    if needs_values:
        grad_values = FactoredGradient.of_gather(values, slots, weights, grad_output)
    return grad_values, None, grad_weights if needs_weights else None


_product_key_topk = _topk("product_key_topk")
_flat_key_topk = _topk("flat_key_topk")
_GATHER_ARGUMENTS = "(Tensor values, Tensor slots, Tensor weights) -> Tensor"
_gather_values = register(f"gather_values{_GATHER_ARGUMENTS}", _run_gather, _fake_gather)
_gather_values_with_gradient = register_with_gradient(
    f"gather_values_with_gradient{_GATHER_ARGUMENTS}",
    _run_gather,
    _fake_gather,
    _save_gather,
    _gather_backward,
)
_gather_values_with_sparse_gradient = register_with_gradient(
    f"gather_values_with_sparse_gradient{_GATHER_ARGUMENTS}",
    _run_gather,
    _fake_gather,
    _save_gather,
    _gather_backward_sparse,
)
_gather_values_with_factored_gradient = register_with_gradient(
    f"gather_values_with_factored_gradient{_GATHER_ARGUMENTS}",
    _run_gather,
    _fake_gather,
    _save_gather,
    _gather_backward_factored,
)
_gather_values_backward = register(
    "gather_values_backward(Tensor grad_output, Tensor values, Tensor slots, Tensor weights,"
    " bool needs_values, bool needs_weights) -> (Tensor, Tensor)",
    _run_gather_backward,
    _fake_gather_backward,
)
_gather_values_backward_sparse = register(
    "gather_values_backward_sparse(Tensor grad_output, Tensor values, Tensor slots,"
    " Tensor weights, bool needs_weights) -> (Tensor, Tensor, Tensor)",
    _run_gather_backward_sparse,
    _fake_gather_backward_sparse,
)
refuse_second_gradient(_gather_values_backward)
refuse_second_gradient(_gather_values_backward_sparse)
