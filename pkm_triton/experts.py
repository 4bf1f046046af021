"""A mixture of a million experts of one hidden unit each (PEER, He 2024)."""

import math
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice
from .memory import ProductKeyMemory
from .ops import sample_values
from .ops.expert_functions import ACTIVATIONS, Activation, gather_experts

Gate = Literal["softmax", "relu"]


class ProductKeyExperts(ProductKeyMemory):
    """A layer of N² experts, of which a token finds its best by product keys (He 2024, PEER).

    An expert is a network of one hidden unit, with an input row u and an output row v; a token x
    gets the sum over heads and their `top_k` experts i of gate_i · act(<u_i, x>) · v_i. Neither
    pass forms a row a read, and the backward pass recomputes the activations: it saves 12 bytes a
    read, and x.

    Args:
        dim: width of a token, and of u.
        value_dim: width of v and of the output; by default `dim`.
        activation: "gelu", "silu", "relu" or "relu2" (the square of relu).
        gate: what a score becomes: "softmax" over a head's experts, or "relu", each by itself.
        **options: those of `ProductKeyMemory`; `sparse_grad` is of both tables.

    Attributes:
        inputs: parameter [N², dim], the rows u.
        values: parameter [N², value_dim], the rows v.

    Raises:
        TypeError: as `ProductKeyMemory`.
        ValueError: likewise, or if activation or gate is unknown.
    """

    table_names = ("inputs", "values")

    def __init__(
        self,
        dim: int,
        value_dim: int | None = None,
        *,
        activation: Activation = "gelu",
        gate: Gate = "softmax",
        **options: Any,
    ) -> None:
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("gate", gate, get_args(Gate))
        super().__init__(dim, value_dim, **options)
        self.activation: Activation = activation
        self.gate: Gate = gate
        self.inputs = nn.Parameter(self.values.new_empty(self.num_slots, self.dim))
        nn.init.normal_(self.inputs, std=self.dim**-0.5)

    def _reset_memory(self) -> None:
        super()._reset_memory()
        if "inputs" in self._parameters:
            nn.init.normal_(self.inputs, std=self.dim**-0.5)

    def weigh(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The gate of each expert that a query finds, [..., H, k], and its number, int32."""
        scores, slots = self._topk(query)
        return (scores.softmax(-1) if self.gate == "softmax" else scores.relu()), slots

    def _read(
        self,
        x: Tensor,
        mask: Tensor | None,
        slots: Tensor,
        weights: Tensor,
        gate: Tensor | None = None,
    ) -> Tensor:
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        inputs, values = self.inputs, self.values
        products = sample_values(inputs, slots, x, sparse_grad=self._form(inputs))
        rows = math.prod(slots.shape[:-1])
        flat = [each.reshape(rows, slots.shape[-1]) for each in (slots, weights, products)]
        form = self._form(values)
        out = gather_experts(values, flat[0], flat[1], flat[2], self.activation, form)
        out = out.view(*slots.shape[:-1], self.value_dim)
        return out if gate is None else out * F.silu(gate)

    def arguments(self) -> dict[str, Any]:
        """The arguments that make a layer of this kind and these sizes, as plain data."""
        return {**super().arguments(), "activation": self.activation, "gate": self.gate}

    def extra_repr(self) -> str:
        """The layer's sizes."""
        return f"{super().extra_repr()}, activation={self.activation!r}, gate={self.gate!r}"
