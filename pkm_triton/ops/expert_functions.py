"""Experts of one hidden unit each, gated and gathered; what is recomputed in the backward pass.

Shapes: T tokens, R experts a token, K experts.
    values [K, d_v]; slots, gates, products [T, R]
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from pkm_triton._checks import SparseGrad

from . import table_operators
from .gather_backward import gather_backward
from .modes import differentiated_again, recorded, transformed
from .table_functions import gather, gather_backward_of_ops

Activation = Literal["gelu", "silu", "relu", "relu2"]


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "silu": (F.silu, _silu_backward),
    "relu": (F.relu, lambda grad, x: grad * (x > 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda grad, x: 2 * grad * F.relu(x)),
}
"""Each with its derivative times a gradient, which is differentiable in turn."""


def gather_experts(
    values: Tensor,
    slots: Tensor,
    gates: Tensor,
    products: Tensor,
    activation: Activation,
    sparse_grad: SparseGrad,
) -> Tensor:
    """The sums over r of gates · act(products) · values[slots], [T, d_v], in values' dtype.

    All that is saved for the backward pass is slots, gates and products.
    """
    plain = not (torch.compiler.is_compiling() or transformed())
    if plain and recorded(values, gates, products):
        return _GatherExperts.apply(values, slots, gates, products, activation, sparse_grad)
    # The compiler decides for itself what it recomputes.
    weights = gates * ACTIVATIONS[activation][0](products)
    return gather(values, slots, weights, values.dtype, sparse_grad)


class _GatherExperts(Function):
    @staticmethod
    def forward(
        values: Tensor,
        slots: Tensor,
        gates: Tensor,
        products: Tensor,
        activation: Activation,
        sparse_grad: SparseGrad,
    ) -> Tensor:
        weights = gates * ACTIVATIONS[activation][0](products)
        return table_operators.gather_values(values, slots, weights, values.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.activation, ctx.sparse_grad = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs_values = ctx.needs_input_grad[0]
        values, slots, gates, products = ctx.saved_tensors
        function, derivative = ACTIVATIONS[ctx.activation]
        active = function(products)
        backward = gather_backward_of_ops if differentiated_again() else gather_backward
        grad_values, grad_weights = backward(
            grads[0], (values, slots, gates * active), needs_values, True, ctx.sparse_grad
        )
        assert grad_weights is not None
        return (
            grad_values if needs_values else None,
            None,
            grad_weights * active,
            derivative(grad_weights * gates, products),
            None,
            None,
        )
