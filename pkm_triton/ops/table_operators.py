"""The operators on a table of values, which run either backend.

Shapes: T tokens, R reads a token, K slots.
    values [K, d_v]; slots, weights, products [T, R]; x, grad_output [T, d_v]
"""

import torch
from torch import Tensor

from pkm_triton import reference
from pkm_triton._backend import implementation
from pkm_triton._checks import check_slot_range, int32_slots

from .registry import register


def run_gather_values(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """The gather, by the backend in force; a slot on the CPU that is out of range raises."""
    if slots.numel() == 0 or values.shape[1] == 0:
        check_slot_range(slots, values.shape[0])
        return values.new_zeros(slots.shape[0], values.shape[1], dtype=dtype)
    twin = implementation(values, weights)
    gate = None if gate is None else gate.contiguous()
    if twin is reference and slots.is_cpu and slots.dtype == torch.int32:
        # torch looks at every slot as it reads, so that a pass of our own is not needed.
        try:
            return twin.gather_values(
                values.contiguous(), slots.contiguous(), weights.contiguous(), dtype, gate
            )
        except (RuntimeError, IndexError):
            check_slot_range(slots, values.shape[0])
            raise
    slots = int32_slots(slots, values.shape[0])
    return twin.gather_values(values.contiguous(), slots, weights.contiguous(), dtype, gate)


def fake_gather_values(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """The shape of the gather."""
    return values.new_empty(slots.shape[0], values.shape[1], dtype=dtype)


def _run_sample_values(values: Tensor, slots: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    slots = int32_slots(slots, values.shape[0])
    if slots.numel() == 0 or values.shape[1] == 0:
        return values.new_zeros(slots.shape, dtype=dtype)
    run = implementation(values, x).sample_values
    return run(values.contiguous(), slots, x.contiguous(), dtype)


def _fake_sample_values(values: Tensor, slots: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return values.new_empty(slots.shape, dtype=dtype)


def _run_scatter_values(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    slots = int32_slots(slots, num_slots)
    if slots.numel() == 0 or x.shape[1] == 0:
        return x.new_zeros(num_slots, x.shape[1], dtype=dtype)
    run = implementation(x, weights).scatter_values
    return run(slots, weights.contiguous(), x.contiguous(), num_slots, dtype)


def _fake_scatter_values(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(num_slots, x.shape[1], dtype=dtype)


def _coalesced(rows: Tensor, row_sums: Tensor, num_slots: int) -> Tensor:
    """The sparse COO tensor [K, d_v] of rows [M] that ascend, and their sums [M, d_v]."""
    shape = num_slots, row_sums.shape[1]
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), row_sums, shape, is_coalesced=True, check_invariants=False
    )


def _fake_coalesced(like: Tensor, slots: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """Of as many rows as there are reads: how many were read depends on the data."""
    rows = slots.new_empty(slots.numel(), dtype=torch.int64)
    return _coalesced(rows, like.new_empty(slots.numel(), like.shape[1], dtype=dtype), num_slots)


def _run_scatter_values_sparse(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    slots = int32_slots(slots, num_slots)
    if slots.numel() == 0 or x.shape[1] == 0:
        rows = slots.unique().to(torch.int64)
        return _coalesced(rows, x.new_empty(rows.shape[0], x.shape[1], dtype=dtype), num_slots)
    run = implementation(x, weights).scatter_values_sparse
    rows, sums = run(slots, weights.contiguous(), x.contiguous(), num_slots, dtype)
    return _coalesced(rows, sums, num_slots)


def _fake_scatter_values_sparse(
    slots: Tensor, weights: Tensor, x: Tensor, num_slots: int, dtype: torch.dtype
) -> Tensor:
    return _fake_coalesced(x, slots, num_slots, dtype)


def _run_gather_values_backward(
    grad_output: Tensor,
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    needs_values: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    slots = int32_slots(slots, values.shape[0])
    if slots.numel() == 0 or values.shape[1] == 0:
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


def _fake_gather_values_backward(
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


def _run_gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor]:
    slots = int32_slots(slots, values.shape[0])
    if slots.numel() == 0 or values.shape[1] == 0:
        rows = slots.unique().to(torch.int64)
        grad_rows = values.new_empty(rows.shape[0], values.shape[1])
        grad_weights = weights.new_zeros(weights.shape if needs_weights else 0)
    else:
        run = implementation(values, weights).gather_values_backward_sparse
        tensors = grad_output.contiguous(), values.contiguous(), slots, weights.contiguous()
        rows, grad_rows, grad_weights = run(*tensors, needs_weights)
    return _coalesced(rows, grad_rows, values.shape[0]), grad_weights


def _fake_gather_values_backward_sparse(
    grad_output: Tensor, values: Tensor, slots: Tensor, weights: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor]:
    grad_values = _fake_coalesced(values, slots, values.shape[0], values.dtype)
    return grad_values, weights.new_empty(weights.shape if needs_weights else 0)


gather_values = register(
    "gather_values(Tensor values, Tensor slots, Tensor weights, ScalarType dtype,"
    " Tensor? gate=None) -> Tensor",
    run_gather_values,
    fake_gather_values,
)
sample_values = register(
    "sample_values(Tensor values, Tensor slots, Tensor x, ScalarType dtype) -> Tensor",
    _run_sample_values,
    _fake_sample_values,
)
scatter_values = register(
    "scatter_values(Tensor slots, Tensor weights, Tensor x, SymInt num_slots, ScalarType dtype)"
    " -> Tensor",
    _run_scatter_values,
    _fake_scatter_values,
)
scatter_values_sparse = register(
    "scatter_values_sparse(Tensor slots, Tensor weights, Tensor x, SymInt num_slots,"
    " ScalarType dtype) -> Tensor",
    _run_scatter_values_sparse,
    _fake_scatter_values_sparse,
)
gather_values_backward = register(
    "gather_values_backward(Tensor grad_output, Tensor values, Tensor slots, Tensor weights,"
    " bool needs_values, bool needs_weights) -> (Tensor, Tensor)",
    _run_gather_values_backward,
    _fake_gather_values_backward,
)
gather_values_backward_sparse = register(
    "gather_values_backward_sparse(Tensor grad_output, Tensor values, Tensor slots,"
    " Tensor weights, bool needs_weights) -> (Tensor, Tensor)",
    _run_gather_values_backward_sparse,
    _fake_gather_values_backward_sparse,
)
