"""Gradients of a table that are no dense tensors: those of its rows, and those kept as factors.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, and G the gradient of the
gather's output, the table's gradient is Sᵀ · G. Its factors take T · (d_v + 2 R) elements, where
the rows that were read take up to T · R · d_v.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._backend import implementation
from ._checks import int32_slots


def check_sparse_gradient(grad: Tensor) -> None:
    """The rows of a sparse COO gradient lie in the parameter: on the CPU, where looking is free.

    Raises:
        ValueError: if one does not.
    """
    indices = grad._indices()
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    for dimension, (low, high) in enumerate(zip(*indices.aminmax(dim=1), strict=True)):
        if low < 0 or high >= grad.shape[dimension]:
            raise ValueError(
                f"a sparse gradient has indices from {int(low)} to {int(high)} in dimension "
                f"{dimension}, but its parameter has {grad.shape[dimension]} there"
            )


def rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a sparse COO gradient, [M] and each once, and their gradient, [M, d].

    With several sparse dimensions a row is an element of all of them, counted as in memory.
    """
    indices = grad._indices()
    # Before the end of a backward pass torch's mark that it is coalesced is lost (see
    # `coalesced_gradient`); sorting it again would cost as much as the step.
    in_order = grad.is_coalesced() or (
        grad.sparse_dim() == 1 and not bool((indices[0, 1:] <= indices[0, :-1]).any())
    )
    if not in_order:
        grad = grad.coalesce()
        indices = grad._indices()
    rows = indices[0]
    for size, index in zip(grad.shape[1 : grad.sparse_dim()], indices[1:], strict=True):
        rows = rows * size + index
    values = grad._values()
    width = math.prod(values.shape[1:])
    return rows.contiguous(), values.contiguous().view(values.shape[0], width)


def coalesced_gradient(rows: Tensor, grad_rows: Tensor, table: Tensor) -> Tensor:
    """The sparse gradient of a table, of rows that ascend; to be called in a backward pass.

    As it stores a gradient, torch drops the mark that it is coalesced, and whoever asks for its
    rows sorts them again: the mark is set again at the end of the pass.
    """
    grad = torch.sparse_coo_tensor(
        rows.unsqueeze(0), grad_rows, table.shape, is_coalesced=True, check_invariants=False
    )
    if table.is_leaf and type(rows) is Tensor and not torch.compiler.is_compiling():
        # A reference to the rows would make torch copy the gradient as it stores it.
        known = rows.data_ptr(), rows.numel()

        def mark() -> None:
            stored = table.grad
            if stored is None or stored.layout != torch.sparse_coo:
                return
            if (stored._indices().data_ptr(), stored._nnz()) == known:
                stored._coalesced_(True)

        torch.autograd.Variable._execution_engine.queue_callback(mark)  # pyright: ignore[reportAttributeAccessIssue]
    return grad


@dataclass(frozen=True)
class Reads:
    """What one gather read of a table, and the gradient of its output.

    Attributes:
        slots: [T, R], int32 or int64.
        weights: [T, R].
        grad_output: [T, d_v].
    """

    slots: Tensor
    weights: Tensor
    grad_output: Tensor


class FactoredGradient(Tensor):
    """The gradient [K, d_v] of a table, as the reads whose sum it is; it has no elements.

    Gradients of several gathers, of one backward pass or of many, add up to one that holds the
    reads of all. `optim.SparseAdam` makes its step from it, row by row, and `GradScaler` can scale
    it; `to_sparse` and `to_dense` make it an ordinary gradient. Whatever else needs its elements
    (a norm, another optimiser, `DistributedDataParallel`) raises TypeError.

    Attributes:
        reads: what was read, a gather each.
    """

    reads: list[Reads]

    @staticmethod
    def __new__(cls, table: Tensor, reads: list[Reads]) -> "FactoredGradient":
        """A gradient in the shape, dtype and device of `table`."""
        made = Tensor._make_wrapper_subclass(
            cls, table.shape, dtype=table.dtype, device=table.device
        )
        made.reads = reads
        return made

    def __init__(self, table: Tensor, reads: list[Reads]) -> None: ...

    @classmethod
    def of_gather(
        cls, table: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor
    ) -> "FactoredGradient":
        """The gradient of one gather; copies, for its caller may use the buffers again."""
        copies = (x.detach().clone() for x in (slots, weights, grad_output))
        return cls(table, [Reads(*copies)])

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"FactoredGradient(shape={list(self.shape)}, gathers={len(self.reads)})"

    def merged(self) -> Reads:
        """All reads as those of one gather, one after another; contiguous, slots int32."""
        parts = [part for part in self.reads if part.slots.numel() > 0] or self.reads[:1]
        reads = max(part.slots.shape[1] for part in parts)

        def joined(tensors: list[Tensor]) -> Tensor:
            return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)

        def padded(x: Tensor, filling: Tensor) -> Tensor:
            missing = reads - x.shape[1]
            return torch.cat([x, filling.expand(-1, missing)], 1) if missing else x

        # Short tokens read their last row again, with a weight of zero.
        slots = [int32_slots(part.slots, self.shape[0]) for part in parts]
        return Reads(
            joined([padded(x, x[:, -1:]) for x in slots]),
            joined([padded(x, torch.zeros_like(x[:, -1:])) for x in (p.weights for p in parts)]),
            joined([part.grad_output for part in parts]),
        )

    def to_sparse(self, *_: Any, **__: Any) -> Tensor:
        """The same as a coalesced sparse COO tensor of the rows that were read."""
        merged = self.merged()
        grad_output = merged.grad_output
        # Of the table only the shape is asked for.
        table = grad_output.new_empty(1, 1).expand(self.shape)
        if merged.slots.numel() == 0:
            rows, grad_rows = grad_output.new_empty(0, dtype=torch.int64), table[:0]
        else:
            twin = implementation(table, merged.weights).gather_values_backward_sparse
            rows, grad_rows, _ = twin(grad_output, table, merged.slots, merged.weights, False)
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), grad_rows, self.shape, is_coalesced=True, check_invariants=False
        )

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The same as a dense tensor."""
        return self.to_sparse().to_dense()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        run = _IMPLEMENTED.get(func)
        if run is None:
            raise TypeError(
                f"{func} needs the elements of a gradient that is kept as its factors "
                "(sparse_grad='factored'): pkm_triton.optim.SparseAdam takes it, GradScaler can "
                "unscale it; for anything else use sparse_grad=True or False"
            )
        return run(*args, **(kwargs or {}))


def _alias(grad: FactoredGradient, **_: Any) -> FactoredGradient:
    return FactoredGradient(grad, list(grad.reads))


def _new_empty(grad: FactoredGradient, size: Any, stride: Any, **_: Any) -> FactoredGradient:
    if tuple(size) != grad.shape:
        raise TypeError(f"a gradient that is kept as its factors makes none of shape {list(size)}")
    return FactoredGradient(grad, [])


def _copy(target: Any, source: Any, non_blocking: bool = False) -> FactoredGradient:
    _check_kinds(target, source)
    target.reads[:] = source.reads
    return target


def _check_kinds(first: Any, second: Any, alpha: float = 1) -> None:
    for each in (first, second):
        if not isinstance(each, FactoredGradient):
            raise TypeError(
                "a gradient that is kept as its factors adds to its like alone: give all gathers "
                "of one table sparse_grad='factored', or none"
            )
    if alpha != 1:
        raise TypeError("gradients that are kept as their factors add with alpha 1 only")


def _add(first: Any, second: Any, alpha: float = 1) -> FactoredGradient:
    _check_kinds(first, second, alpha)
    return FactoredGradient(first, first.reads + second.reads)


def _add_in_place(first: Any, second: Any, alpha: float = 1) -> FactoredGradient:
    _check_kinds(first, second, alpha)
    first.reads.extend(second.reads)
    return first


def _unscale(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """What `GradScaler` does to gradients: multiply them, and note what is not finite."""
    unscale = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_
    for grad in grads:
        if not isinstance(grad, FactoredGradient):
            unscale([grad], found_inf, inverse_scale)
            continue
        for index, part in enumerate(grad.reads):
            # Copies: the factors are parts of the graph.
            weights, grad_output = part.weights.clone(), part.grad_output.clone()
            unscale([weights], found_inf, torch.ones_like(inverse_scale))
            unscale([grad_output], found_inf, inverse_scale)
            grad.reads[index] = Reads(part.slots, weights, grad_output)


_aten = torch.ops.aten
_IMPLEMENTED = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _alias,
    # How autograd copies a gradient that something else refers to.
    _aten.new_empty_strided.default: _new_empty,
    _aten.copy_.default: _copy,
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _add_in_place,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
