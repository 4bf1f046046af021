"""The ops on a table of values: gather, sample and scatter, as users call them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pkm_triton._checks import (
    SparseGrad,
    check_gather_values,
    check_sample_values,
    check_scatter_values,
    check_slot_range,
    check_sparse_grad,
)
from pkm_triton.gradients import FactoredGradient

from . import table_operators
from .modes import recorded, transformed
from .table_functions import gather, sample, scatter, scatter_sparse


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
        [..., d_v], in the dtype of values, accumulated in float32 (float64 for float64). Neither
        pass forms [..., R, d_v]. Same inputs, same bits, in both passes.

        Differentiable in values and weights any number of times, in any mode; `torch.func.vmap`
        takes a batch of tokens, or of tables, in one call. But a factored gradient cannot be
        differentiated again.

    Raises:
        TypeError: if values or weights is no dense floating tensor, or slots no integer tensor.
        ValueError: if shapes or devices do not fit, sparse_grad is neither a bool nor "factored",
            or a slot on the CPU is out of range. On a GPU the range is not checked, since that
            would wait for the device: there such a slot reads nothing, and makes its token's
            output NaN.
        RuntimeError: if a factored gradient is to be differentiated again, or torch asks for a
            batch of sparse or factored ones (`is_grads_batched`).
    """
    check_gather_values(values, slots, weights)
    check_sparse_grad(sparse_grad)
    op: Any = gather
    if sparse_grad == "factored" and torch.compiler.is_compiling() and recorded(values, weights):
        # A compiled graph cannot return such a gradient.
        op = torch.compiler.disable(gather)
    if slots.ndim == 2:
        return op(values, slots, weights, values.dtype, sparse_grad)
    out = op(values, _rows(slots), _rows(weights), values.dtype, sparse_grad)
    return out.view(*slots.shape[:-1], values.shape[1])


def gather_gated_values(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    gate: Tensor,
    sparse_grad: SparseGrad = False,
) -> Tensor:
    """`gather_values` times silu(gate), gate [..., d_v]; without a gradient one kernel."""
    separately = transformed() or recorded(values, weights, gate) or gate.dtype != values.dtype
    if separately:
        return gather_values(values, slots, weights, sparse_grad) * F.silu(gate)
    check_gather_values(values, slots, weights)
    out = table_operators.gather_values(
        values, _rows(slots), _rows(weights), values.dtype, _rows(gate)
    )
    return out.view(*slots.shape[:-1], values.shape[1])


def sample_values(
    values: Tensor, slots: Tensor, x: Tensor, sparse_grad: SparseGrad = False
) -> Tensor:
    """The inner products of each token with the rows of a table that it reads.

    The adjoint of `gather_values` in its weights: what a mixture of tiny experts computes before
    its activation, and the gradient of a gather's weights.

    Args:
        values: [K, d]; float32, bfloat16, float16 or float64.
        slots: [..., R], int32 or int64, each in [0, K); a slot may come twice.
        x: [..., d], any of the dtypes of values.
        sparse_grad: what the gradient of values is, as of `gather_values`; under `torch.compile`
            a sparse or factored one breaks the graph.

    Returns:
        [..., R]: <x[t], values[slots[t, r]]>, accumulated and returned in float32 (float64 if an
        input is float64). Neither pass forms [..., R, d]. Same inputs, same bits. Differentiable
        in values and x any number of times, in any mode; `torch.func.vmap` takes a batch of
        tokens, or of tables, in one call.

    Raises:
        TypeError: if values or x is no dense floating tensor, or slots no integer tensor.
        ValueError: if shapes or devices do not fit, sparse_grad is neither a bool nor "factored",
            or a slot on the CPU is out of range. On a GPU, where the range is not checked, the
            product of such a slot is NaN.
        RuntimeError: if a factored gradient is to be differentiated again, or torch asks for a
            batch of sparse or factored ones (`is_grads_batched`).
    """
    check_sample_values(values, slots, x)
    check_sparse_grad(sparse_grad)
    wide = torch.float64 if torch.float64 in (values.dtype, x.dtype) else torch.float32
    op: Any = sample
    if sparse_grad and torch.compiler.is_compiling() and recorded(values, x):
        op = torch.compiler.disable(sample)
    if slots.ndim == 2:
        return op(values, slots, x, wide, sparse_grad)
    return op(values, _rows(slots), _rows(x), wide, sparse_grad).view(slots.shape)


def scatter_values(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, sparse: SparseGrad = False
) -> Tensor:
    """The sum, for each row of a table, of the weighted tokens that read it.

    The adjoint of `gather_values` in its table: the gradient of a gather's values.

    Args:
        slots: [..., R], int32 or int64, each in [0, num_slots); a slot may come twice.
        weights: [..., R]; float32, bfloat16, float16 or float64.
        x: [..., d], any of the dtypes of weights.
        num_slots: K, the rows of the result.
        sparse: the form of the result, as of the gradient of `gather_values`. False: dense. True:
            a coalesced sparse COO tensor of the rows that were read. "factored": a
            `FactoredGradient`, which has no derivative.

    Returns:
        [K, d]: the sum of weights[t, r] · x[t] over all reads of each slot, in the dtype of x,
        accumulated in float32 (float64 for float64). Nothing forms [..., R, d]. Same inputs, same
        bits. Differentiable in weights and x any number of times, in any mode; `torch.func.vmap`
        takes a batch in one call, of a dense result alone.

    Raises:
        TypeError: if weights or x is no dense floating tensor, slots no integer tensor, or
            num_slots no integer.
        ValueError: if shapes or devices do not fit, num_slots is negative or not below 2³¹, sparse
            is neither a bool nor "factored", or a slot on the CPU is out of range. On a GPU, where
            the range is not checked, such a slot adds to no row.
        RuntimeError: if a factored result would have to be differentiable.
    """
    num_slots = check_scatter_values(slots, weights, x, num_slots)
    check_sparse_grad(sparse, "sparse")
    slots, weights, x = _rows(slots), _rows(weights), _rows(x)
    if sparse == "factored":
        if recorded(weights, x):
            raise RuntimeError(
                "what is kept as its factors (sparse='factored') has no derivative: call "
                "scatter_values under torch.no_grad(), or with sparse=True or False"
            )
        check_slot_range(slots, num_slots)
        shape = x.new_empty(1, 1).expand(num_slots, x.shape[1])
        return FactoredGradient.of_gather(shape, slots, weights, x)
    form = scatter_sparse if sparse else scatter
    return form(slots, weights, x, num_slots, x.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """All but the last dimension as one."""
    if tensor.ndim == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
