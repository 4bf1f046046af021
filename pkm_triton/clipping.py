"""Clipping of dense and sparse gradients together, by their global norm."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .gradients import FactoredGradient, rows_and_values


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, for dense and sparse gradients together.

    The norm is that of all gradients as one vector. A sparse gradient is coalesced for it, in
    place: the same row twice is one entry, not two.

    Args:
        parameters: those whose gradients are scaled, in place, if their norm is larger.
        max_norm: the largest norm allowed.
        norm_type: the p of the p-norm; may be infinity.
        error_if_nonfinite: raise if the norm is NaN or infinite.

    Returns:
        The norm before scaling, a tensor of one element.

    Raises:
        TypeError: if a gradient is kept as its factors; nothing has been scaled then.
        ValueError: if max_norm or norm_type is not above 0.
        RuntimeError: if the norm is not finite and error_if_nonfinite is set.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}, but must be above 0")
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}, but must be above 0")
    values = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, FactoredGradient):
            raise TypeError(
                "a gradient that is kept as its factors (sparse_grad='factored') has no norm "
                "before its rows are made: use sparse_grad=True with clip_grad_norm_"
            )
        if parameter.grad.is_sparse:
            rows, grad_rows = rows_and_values(parameter.grad)
            parameter.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0),
                grad_rows,
                parameter.grad.shape,
                is_coalesced=True,
                check_invariants=False,
            )
            values.append(grad_rows)
        else:
            values.append(parameter.grad)
    norm = get_total_norm(values, norm_type, error_if_nonfinite)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale.to(value.device))
    return norm
