"""The first backward pass of the gather, in one pass: the values' gradient in each of its forms.

Shapes: T tokens, R reads a token, K slots, M rows that were read.
    grad_output [T, d_v]; values [K, d_v]; slots, weights [T, R]; rows [M]; row_sums [M, d_v]
"""

from typing import Any

import torch
from torch import Tensor

from pkm_triton._checks import SparseGrad
from pkm_triton.gradients import FactoredGradient, coalesced_gradient

from . import table_operators
from .registry import LIBRARY, is_defined, register


def check_differentiable(sparse_grad: SparseGrad) -> None:
    """A gradient that is to be differentiated again is not kept as its factors."""
    if sparse_grad == "factored":
        raise RuntimeError(
            "a gradient that is kept as its factors (sparse_grad='factored') cannot be "
            "differentiated again, nor be made under torch.func: use sparse_grad=True or False"
        )


def _check_one_at_a_time(sparse_grad: SparseGrad, grad_output: Tensor) -> None:
    """Of a batch of gradients (`is_grads_batched`), which torch makes at once, all are dense."""
    is_batch = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    if sparse_grad and is_batch(grad_output):
        raise RuntimeError(
            "torch has no batch of sparse gradients (is_grads_batched, vectorize=True): use "
            "sparse_grad=False, or a table that requires no gradient"
        )


def table_gradient(
    values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, sparse_grad: SparseGrad
) -> Tensor:
    """The scatter of x [T, d_v] as the gradient of values alone, in the form `sparse_grad` says.

    As a function that autograd does not see.
    """
    _check_one_at_a_time(sparse_grad, weights)
    if sparse_grad == "factored":
        return FactoredGradient.of_gather(values, slots, weights, x.to(values.dtype))
    scattered = slots, weights, x, values.shape[0], values.dtype
    if not sparse_grad:
        return table_operators.scatter_values(*scattered)
    return _marked(table_operators.scatter_values_sparse(*scattered), values)


def gather_backward(
    grad_output: Tensor,
    reads: tuple[Tensor, Tensor, Tensor],
    needs_values: bool,
    needs_weights: bool,
    sparse_grad: SparseGrad,
) -> tuple[Tensor, Tensor]:
    """Gradients of values and weights; what is not needed is empty. reads: values, slots, weights.

    As a function that autograd does not see.
    """
    values, slots, weights = reads
    if needs_values:
        _check_one_at_a_time(sparse_grad, grad_output)
    if needs_values and sparse_grad is True:
        grad_values, grad_weights = table_operators.gather_values_backward_sparse(
            grad_output, *reads, needs_weights
        )
        return _marked(grad_values, values), grad_weights
    factored = needs_values and sparse_grad == "factored"
    grad_values, grad_weights = table_operators.gather_values_backward(
        grad_output, *reads, needs_values and not factored, needs_weights
    )
    if factored:
        grad_values = FactoredGradient.of_gather(values, slots, weights, grad_output)
    return grad_values, grad_weights


def _marked(grad: Tensor, table: Tensor) -> Tensor:
    """A sparse gradient that keeps the mark that it is coalesced as torch stores it."""
    if torch.compiler.is_compiling():
        return grad
    return coalesced_gradient(grad._indices()[0], grad._values(), table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_values, _, needs_weights, _ = ctx.needs_input_grad
    grad_values, grad_weights = gather_backward(
        grad_output, ctx.saved_tensors, needs_values, needs_weights, True
    )
    return (
        grad_values if needs_values else None,
        None,
        grad_weights if needs_weights else None,
        None,
    )


_DEFINED = is_defined("gather_values_with_sparse_gradient")
gather_values_with_sparse_gradient = register(
    "gather_values_with_sparse_gradient(Tensor values, Tensor slots, Tensor weights,"
    " ScalarType dtype) -> Tensor",
    table_operators.run_gather_values,
    table_operators.fake_gather_values,
)
"""For compiled code alone, since the compiler traces no Function whose gradient is sparse."""
if not _DEFINED:
    torch.library.register_autograd(
        gather_values_with_sparse_gradient.name(), _backward, setup_context=_save, lib=LIBRARY
    )
