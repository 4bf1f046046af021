"""Gradients of a table that are no dense tensors: those of its rows, and those kept as factors."""

import math

import torch
from torch import Tensor

from .factored import FactoredGradient
from .reads import Reads

__all__ = [
    "FactoredGradient",
    "Reads",
    "check_sparse_gradient",
    "coalesced_gradient",
    "local",
    "rows_and_values",
]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


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
