"""Gather, scatter and sample, closed under differentiation.

With S the sparse [T, K] matrix of (slots, weights): gather S · V, scatter Sᵀ · X, sample X · Vᵀ at
the places of S. Each is linear in each of its two floating arguments, and the derivative in one is
made of the other two ops; so a derivative of any order, in any mode, is made of these.

Shapes: T tokens, R reads a token, K slots, M rows that were read.
    values [K, d_v]; slots, weights [T, R]; x [T, d_v]; rows [M]; row_sums [M, d_v]
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pkm_triton._checks import SparseGrad

from . import table_operators
from .gather_backward import (
    check_differentiable,
    gather_backward,
    gather_values_with_sparse_gradient,
    table_gradient,
)
from .modes import differentiated_again, recorded, transformed
from .rules import batched, slots_of_tables, sum_of_tangents

_Grads = tuple[Tensor | None, ...]
_USE_DENSE = "use sparse_grad=False of gather_values, sparse=False of scatter_values"


def gather(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    sparse_grad: SparseGrad = False,
) -> Tensor:
    """S · V in `dtype`, [T, d_v]; the gradient of values in the form `sparse_grad` says."""
    if transformed():
        return _GatherWithRules.apply(values, slots, weights, dtype, sparse_grad)
    if recorded(values, weights):
        if sparse_grad is True and torch.compiler.is_compiling():
            return gather_values_with_sparse_gradient(values, slots, weights, dtype)
        return _Gather.apply(values, slots, weights, dtype, sparse_grad)
    return table_operators.gather_values(values, slots, weights, dtype)


def sample(
    values: Tensor,
    slots: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    sparse_grad: SparseGrad = False,
) -> Tensor:
    """X · Vᵀ at the places of S in `dtype`, [T, R]; the gradient of values likewise."""
    if transformed():
        return _SampleWithRules.apply(values, slots, x, dtype, sparse_grad)
    if recorded(values, x):
        return _Sample.apply(values, slots, x, dtype, sparse_grad)
    return table_operators.sample_values(values, slots, x, dtype)


def scatter(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    """Sᵀ · X in `dtype`, [K, d_v]."""
    if transformed():
        return _ScatterWithRules.apply(slots, weights, x, num_slots, dtype)
    if recorded(weights, x):
        return _Scatter.apply(slots, weights, x, num_slots, dtype)
    return table_operators.scatter_values(slots, weights, x, num_slots, dtype)


def scatter_sparse(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    """Sᵀ · X in `dtype`, as a coalesced sparse COO tensor of the rows that were read."""
    if transformed():
        return _ScatterSparseWithRules.apply(slots, weights, x, num_slots, dtype)
    if recorded(weights, x):
        return _ScatterSparse.apply(slots, weights, x, num_slots, dtype)
    return table_operators.scatter_values_sparse(slots, weights, x, num_slots, dtype)


class _Gather(Function):
    @staticmethod
    def forward(
        values: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype, sparse_grad: SparseGrad
    ) -> Tensor:
        return table_operators.gather_values(values, slots, weights, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.dtype, ctx.sparse_grad = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        (grad_output,) = grads
        needs_values, _, needs_weights, _, _ = ctx.needs_input_grad
        backward = gather_backward_of_ops if differentiated_again() else gather_backward
        grad_values, grad_weights = backward(
            grad_output, ctx.saved_tensors, needs_values, needs_weights, ctx.sparse_grad
        )
        return (
            grad_values if needs_values else None,
            None,
            grad_weights if needs_weights else None,
            None,
            None,
        )


def gather_backward_of_ops(
    grad_output: Tensor,
    reads: tuple[Tensor, Tensor, Tensor],
    needs_values: bool,
    needs_weights: bool,
    sparse_grad: SparseGrad,
) -> tuple[Tensor | None, Tensor | None]:
    """As `gather_backward`, by operations that are differentiable in turn."""
    values, slots, weights = reads
    grad_values = grad_weights = None
    if needs_values:
        grad_values = _table_gradient_of_ops(values, slots, weights, grad_output, sparse_grad)
    if needs_weights:
        grad_weights = sample(values, slots, grad_output, weights.dtype)
    return grad_values, grad_weights


def _table_gradient_of_ops(
    values: Tensor, slots: Tensor, weights: Tensor, x: Tensor, sparse_grad: SparseGrad
) -> Tensor:
    check_differentiable(sparse_grad)
    form = scatter_sparse if sparse_grad else scatter
    return form(slots, weights, x, values.shape[0], values.dtype)


class _GatherWithRules(_Gather):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        values_t, _, weights_t, *_ = tangents
        values, slots, weights = ctx.saved_tensors
        return sum_of_tangents(
            None if values_t is None else gather(values_t, slots, weights, ctx.dtype),
            None if weights_t is None else gather(values, slots, weights_t, ctx.dtype),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        values, slots, weights, dtype, sparse_grad = args
        size, table_dim = info.batch_size, in_dims[0]
        slots, weights = batched(slots, in_dims[1], size), batched(weights, in_dims[2], size)
        if table_dim is not None:
            values = values.movedim(table_dim, 0)
            slots, sparse_grad = slots_of_tables(slots, values.shape[1]), False
            values = values.flatten(0, 1)
        out = gather(values, slots.flatten(0, 1), weights.flatten(0, 1), dtype, sparse_grad)
        return out.unflatten(0, slots.shape[:2]), 0


class _Sample(Function):
    @staticmethod
    def forward(
        values: Tensor, slots: Tensor, x: Tensor, dtype: torch.dtype, sparse_grad: SparseGrad
    ) -> Tensor:
        return table_operators.sample_values(values, slots, x, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.dtype, ctx.sparse_grad = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        (grad_products,) = grads
        needs_values, _, needs_x, _, _ = ctx.needs_input_grad
        values, slots, x = ctx.saved_tensors
        scattered = _table_gradient_of_ops if differentiated_again() else table_gradient
        reads = values, slots, grad_products, x, ctx.sparse_grad
        return (
            scattered(*reads) if needs_values else None,
            None,
            gather(values, slots, grad_products, x.dtype) if needs_x else None,
            None,
            None,
        )


class _SampleWithRules(_Sample):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        values_t, _, x_t, *_ = tangents
        values, slots, x = ctx.saved_tensors
        return sum_of_tangents(
            None if values_t is None else sample(values_t, slots, x, ctx.dtype),
            None if x_t is None else sample(values, slots, x_t, ctx.dtype),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        values, slots, x, dtype, sparse_grad = args
        size, table_dim = info.batch_size, in_dims[0]
        slots, x = batched(slots, in_dims[1], size), batched(x, in_dims[2], size)
        if table_dim is not None:
            values = values.movedim(table_dim, 0)
            slots, sparse_grad = slots_of_tables(slots, values.shape[1]), False
            values = values.flatten(0, 1)
        products = sample(values, slots.flatten(0, 1), x.flatten(0, 1), dtype, sparse_grad)
        return products.unflatten(0, slots.shape[:2]), 0


class _Scatter(Function):
    @staticmethod
    def forward(
        slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
    ) -> Tensor:
        return table_operators.scatter_values(slots, weights, x, num_slots, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.num_slots, ctx.dtype = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> _Grads:
        (grad_table,) = grads
        _, needs_weights, needs_x, _, _ = ctx.needs_input_grad
        slots, weights, x = ctx.saved_tensors
        if grad_table.is_sparse:
            grad_table, slots = _compact(grad_table, slots)
        return (
            None,
            sample(grad_table, slots, x, weights.dtype) if needs_weights else None,
            gather(grad_table, slots, weights, x.dtype) if needs_x else None,
            None,
            None,
        )


class _ScatterWithRules(_Scatter):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        _, weights_t, x_t, *_ = tangents
        slots, weights, x = ctx.saved_tensors
        form = ctx.num_slots, ctx.dtype
        return sum_of_tangents(
            None if weights_t is None else scatter(slots, weights_t, x, *form),
            None if x_t is None else scatter(slots, weights, x_t, *form),
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        slots, weights, x, num_slots, dtype = args
        size = info.batch_size
        slots, weights = batched(slots, in_dims[0], size), batched(weights, in_dims[1], size)
        x = batched(x, in_dims[2], size)
        slots = slots_of_tables(slots, num_slots).flatten(0, 1)
        table = scatter(slots, weights.flatten(0, 1), x.flatten(0, 1), size * num_slots, dtype)
        return table.unflatten(0, (size, num_slots)), 0


class _ScatterSparse(_Scatter):
    @staticmethod
    def forward(
        slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
    ) -> Tensor:
        return table_operators.scatter_values_sparse(slots, weights, x, num_slots, dtype)


class _ScatterSparseWithRules(_ScatterSparse):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(f"torch has no forward mode of sparse tensors: {_USE_DENSE}")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(f"torch.func.vmap has no batch of sparse tensors: {_USE_DENSE}")


def _compact(table: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a sparse table has, and one of zeros, as a dense one; and where slots are."""
    if table.sparse_dim() != 1:
        return table.to_dense(), slots
    table = table.coalesce()
    rows, values = F.pad(table.indices()[0], (0, 1), value=-1), F.pad(table.values(), (0, 0, 0, 1))
    places = torch.searchsorted(rows[:-1], slots)
    return values, places.where(rows[places] == slots, values.shape[0] - 1)
