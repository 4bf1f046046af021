"""Clipping of all kinds of gradients together, by their global norm."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .gradients import FactoredGradient, local, rows_and_values
from .sharded_gradient import ShardedGradient


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, for all kinds of gradients together.

    Dense, sparse and factored ones, and DTensors, as FSDP2 has them. The norm is that of all
    gradients as one vector. A sparse gradient is coalesced for it, in place: the same row twice is
    one entry, not two. For the norm of one that is kept as its factors (`sparse_grad="factored"`)
    its rows are made, a few columns at a time, and forgotten. With DTensors all ranks must call.

    Args:
        parameters: those whose gradients are scaled, in place, if their norm is larger.
        max_norm: the largest norm allowed; infinity to have the norm alone.
        norm_type: the p of the p-norm; may be infinity, also as "inf".
        error_if_nonfinite: raise if the norm is NaN or infinite; nothing has been scaled then.
        foreach: whether to take dense and sparse gradients many at a time; None: where that is
            faster.

    Returns:
        The norm before scaling, a tensor of one element.

    Raises:
        TypeError: if parameters hold anything but tensors, or max_norm or norm_type is no number.
        ValueError: if max_norm or norm_type is not above 0.
        RuntimeError: if the norm is not finite and error_if_nonfinite is set.
    """
    norm_type = _above_zero("norm_type", math.inf if norm_type == "inf" else norm_type)
    max_norm = _above_zero("max_norm", max_norm)
    parameters = _tensors(parameters)
    dense: list[Tensor] = []
    sharded: list[Any] = []
    factored: list[FactoredGradient] = []
    scaled: list[Tensor] = []
    norms: list[Tensor] = []
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        if isinstance(grad, ShardedGradient):
            norms.append(grad.vector_norm(norm_type))
            scaled.append(grad.shard)
        elif isinstance(grad, FactoredGradient):
            factored.append(grad)
        elif grad.is_sparse:
            grad = parameter.grad = grad if grad.is_coalesced() else _coalesced(grad)
            dense.append(grad._values())
        elif hasattr(grad, "full_tensor"):
            sharded.append(grad)
        else:
            dense.append(grad)
    # The norm of the norms is that of all elements.
    norms += [grad.vector_norm(norm_type) for grad in factored]
    norms += [get_total_norm(dense, norm_type, foreach=foreach)] if dense else []
    if sharded:
        total: Any = get_total_norm(sharded, norm_type, foreach=foreach)
        norms.append(total.full_tensor())
        dense.extend(map(local, sharded))
    norm = get_total_norm(norms, norm_type, error_if_nonfinite)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device in {grad.device for grad in dense}:
        grads = [grad for grad in dense if grad.device == device]
        if foreach is False:
            for grad in grads:
                grad.mul_(scale.to(device))
        else:
            torch._foreach_mul_(grads, scale.to(device))  # pyright: ignore[reportPrivateImportUsage]
    for grad in (*factored, *scaled):
        grad.mul_(scale)
    return norm


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number above 0, not {value!r}")
    if not float(value) > 0:
        raise ValueError(f"{name} is {value}, but must be above 0")
    return float(value)


def _tensors(parameters: Any) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be tensors, not {type(parameters).__name__}")
    tensors = list(parameters)
    for index, each in enumerate(tensors):
        if not isinstance(each, Tensor):
            raise TypeError(f"parameters[{index}] must be a tensor, not {type(each).__name__}")
    return tensors


def _coalesced(grad: Tensor) -> Tensor:
    if grad.sparse_dim() != 1:
        return grad.coalesce()
    rows, grad_rows = rows_and_values(grad)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0),
        grad_rows.view(-1, *grad.shape[1:]),
        grad.shape,
        is_coalesced=True,
        check_invariants=False,
    )
