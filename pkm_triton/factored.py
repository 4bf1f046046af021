"""Gradients of a table that are kept as their factors, and never made.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, and G the gradient of the
gather's output, the table's gradient is Sᵀ · G. Its factors take T · (d_v + 2 R) elements, where
the rows that were read take up to T · R · d_v.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reads import Reads, joined


class FactoredGradient(Tensor):
    """The gradient [K, d_v] of a table, as the reads whose sum it is; it has no elements.

    Gradients of several gathers, of one backward pass or of many, add up to one that holds the
    reads of all. `optim.SparseAdam` makes its step from it, row by row. It can be scaled, set to
    zero, copied, saved, and unscaled by `GradScaler`, and it has a norm, for which its rows are
    made a few columns at a time: so `optim.clip_grad_norm_` and torch's own clip it. `to_sparse`
    and `to_dense` make it an ordinary gradient, as anomaly detection does to look for NaN. What
    else needs its elements (another optimiser, `DistributedDataParallel`) raises
    NotImplementedError.

    As of any tensor, `detach()` gives another view of the same reads, `clone()` a copy.

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
        """The gradient of one gather; of copies, for its caller may use the buffers again."""
        return cls(table, [Reads.copied(slots, weights, grad_output, table.shape[0])])

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"FactoredGradient(shape={list(self.shape)}, gathers={len(self.reads)})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        parts = [(part.slots, part.weights, part.grad_output) for part in self.reads]
        return _from_parts, (tuple(self.shape), self.dtype, str(self.device), parts)

    def share_memory_(self) -> "FactoredGradient":
        """Move the factors into shared memory, as of any tensor."""
        for part in self.reads:
            for factor in (part.slots, part.weights, part.grad_output):
                factor.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the factors lie in shared memory."""
        return all(part.grad_output.is_shared() for part in self.reads)

    def merged(self) -> Reads:
        """All reads as those of one gather, one after another; contiguous."""
        parts = [part for part in self.reads if part.slots.numel() > 0]
        if not parts:
            nothing = torch.empty(0, self.shape[1], dtype=self.dtype, device=self.device)
            return Reads(nothing[:, :0].to(torch.int32), nothing[:, :0], nothing)
        return joined(parts)

    def to_sparse(self, *_: Any, **__: Any) -> Tensor:
        """The same as a coalesced sparse COO tensor of the rows that were read."""
        rows, grad_rows = self.merged().rows(self.shape[0])
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), grad_rows, self.shape, is_coalesced=True, check_invariants=False
        )

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The same as a dense tensor."""
        return self.to_sparse().to_dense()

    def vector_norm(self, norm_type: float = 2.0) -> Tensor:
        """The p-norm of all its elements, p > 0, in float32 (float64 for float64)."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.merged().norm(self.shape[0], norm_type, dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        run = _IMPLEMENTED.get(func)
        if run is None:
            raise _no_elements(func)
        return run(*args, **(kwargs or {}))


def _from_parts(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    parts: list[tuple[Tensor, Tensor, Tensor]],
) -> FactoredGradient:
    """What was pickled; on the device where its factors came to lie."""
    where = parts[0][0].device if parts else torch.device(device)
    table = torch.empty((1,) * len(shape), dtype=dtype, device=where).expand(shape)
    return FactoredGradient(table, [Reads(*part) for part in parts])


# So that `torch.load` brings back what `torch.save` wrote: it holds tensors and sizes alone.
torch.serialization.add_safe_globals([_from_parts])


def _no_elements(func: Any) -> NotImplementedError:
    # No TypeError: of an operator Python would turn that into "unsupported operand type(s)".
    return NotImplementedError(
        f"{func} needs the elements of a gradient that is kept as its factors "
        "(sparse_grad='factored'): pkm_triton.optim.SparseAdam takes it, it can be scaled and "
        "clipped; for anything else use to_sparse(), or sparse_grad=True or False"
    )


def _view(grad: FactoredGradient, **_: Any) -> FactoredGradient:
    return FactoredGradient(grad, grad.reads)


def _clone(grad: FactoredGradient, **_: Any) -> FactoredGradient:
    return FactoredGradient(grad, list(grad.reads))


def _new_empty(grad: FactoredGradient, size: Any, *_: Any, **__: Any) -> FactoredGradient:
    if tuple(size) != grad.shape:
        raise _no_elements(f"making a tensor of shape {list(size)}")
    return FactoredGradient(grad, [])


def _copy_from(target: Any, source: Any, non_blocking: bool = False) -> FactoredGradient:
    _check_kinds(target, source)
    target.reads[:] = source.reads
    return target


def _check_kinds(*grads: Any) -> None:
    if not all(isinstance(each, FactoredGradient) for each in grads):
        raise NotImplementedError(
            "a gradient that is kept as its factors (sparse_grad='factored') adds to its like "
            "alone: give all gathers of one table that form, or none, and step with "
            "pkm_triton.optim.SparseAdam"
        )


def _add(first: Any, second: Any, alpha: float = 1) -> FactoredGradient:
    _check_kinds(first, second)
    added = second.reads if alpha == 1 else [part.scaled(alpha) for part in second.reads]
    return FactoredGradient(first, first.reads + added)


def _factor(grad: Any, factor: Any) -> Any:
    """`factor`, if it is a number or a tensor of one, and `grad` what is scaled."""
    single = not isinstance(factor, Tensor) or factor.numel() == 1
    if not isinstance(grad, FactoredGradient) or isinstance(factor, FactoredGradient) or not single:
        raise _no_elements("a product with a tensor")
    return factor.reshape(()) if isinstance(factor, Tensor) else factor


def _mul(first: Any, second: Any) -> FactoredGradient:
    grad, other = (first, second) if isinstance(first, FactoredGradient) else (second, first)
    factor = _factor(grad, other)
    return FactoredGradient(grad, [part.scaled(factor) for part in grad.reads])


def _div(grad: Any, divisor: Any) -> FactoredGradient:
    return _mul(grad, 1 / _factor(grad, divisor))


def _in_place(run: Callable[..., FactoredGradient]) -> Callable[..., FactoredGradient]:
    def run_in_place(grad: Any, *args: Any, **kwargs: Any) -> FactoredGradient:
        made = run(grad, *args, **kwargs)
        _check_kinds(grad)
        grad.reads[:] = made.reads
        return grad

    return run_in_place


def _zero(grad: FactoredGradient) -> FactoredGradient:
    return FactoredGradient(grad, [])


def _norm(
    grad: FactoredGradient,
    ord: float = 2,  # as torch names it
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is not None or keepdim or not ord > 0:
        raise _no_elements("a norm that is not over all elements, or of an order not above 0")
    return grad.vector_norm(ord).to(dtype or grad.dtype)


def _of_each(op: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on a list: `run` for gradients like these, `op` for all others."""
    in_place = not op._schema.returns

    def run_each(grads: list[Tensor], *args: Any, **kwargs: Any) -> list[Any] | None:
        out: list[Any] = []
        for index, grad in enumerate(grads):
            # What is a list stands for one argument a gradient.
            mine = [arg[index : index + 1] if isinstance(arg, list) else arg for arg in args]
            if isinstance(grad, FactoredGradient):
                single = [arg[0] if isinstance(arg, list) else arg for arg in mine]
                out.append(run(grad, *single, **kwargs))
            else:
                out.extend(op([grad], *mine, **kwargs) or ())
        return None if in_place else out

    return run_each


def _unscale(grads: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """What `GradScaler` does to gradients: multiply them, and note what is not finite."""
    unscale = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_
    for grad in grads:
        if not isinstance(grad, FactoredGradient):
            unscale([grad], found_inf, inverse_scale)
            continue
        for index, part in enumerate(grad.reads):
            # Copies: other gradients may hold the same reads.
            weights, grad_output = part.weights.clone(), part.grad_output.clone()
            unscale([weights], found_inf, torch.ones_like(inverse_scale))
            unscale([grad_output], found_inf, inverse_scale)
            grad.reads[index] = Reads(part.slots, weights, grad_output)


_aten = torch.ops.aten
_mul_in_place, _div_in_place, _zero_in_place = (_in_place(run) for run in (_mul, _div, _zero))
_IMPLEMENTED = {
    _aten.detach.default: _view,
    _aten.alias.default: _view,
    _aten.clone.default: _clone,
    # How autograd copies a gradient that something else refers to.
    _aten.new_empty_strided.default: _new_empty,
    _aten.copy_.default: _copy_from,
    _aten.zeros_like.default: lambda grad, **_: _zero(grad),
    _aten.zero_.default: _zero_in_place,
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _in_place(_add),
    _aten.mul.Tensor: _mul,
    _aten.mul_.Tensor: _mul_in_place,
    _aten.div.Tensor: _div,
    _aten.div_.Tensor: _div_in_place,
    _aten.linalg_vector_norm.default: _norm,
    # How `torch.autograd.detect_anomaly` looks at a gradient.
    _aten.isnan.default: lambda grad: grad.to_sparse().isnan(),
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
for _name, _run in (
    ("_foreach_zero_.default", _zero_in_place),
    ("_foreach_norm.Scalar", _norm),
    ("_foreach_mul_.Scalar", _mul_in_place),
    ("_foreach_mul_.ScalarList", _mul_in_place),
    ("_foreach_mul_.Tensor", _mul_in_place),
    ("_foreach_div_.Scalar", _div_in_place),
    ("_foreach_div_.ScalarList", _div_in_place),
    ("_foreach_div_.Tensor", _div_in_place),
):
    _packet, _overload = _name.split(".")
    _op = getattr(getattr(_aten, _packet), _overload)
    _IMPLEMENTED[_op] = _of_each(_op, _run)
