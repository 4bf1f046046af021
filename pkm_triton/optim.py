"""Optimisation with sparse gradients: Adam on the rows that were read, and gradient clipping."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ._backend import implementation
from ._checks import check_positive

Rounding = Literal["stochastic", "master", "nearest"]
_ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "master", "nearest")
_HALF = (torch.bfloat16, torch.float16)


class SparseAdam(torch.optim.Optimizer):
    """Adam on the rows that were read: a drop-in for `torch.optim.SparseAdam`.

    The moments and the values of a row change only in steps in which its gradient is there, in one
    pass over those rows. Beyond torch's it takes dense gradients too (a step of Adam on every
    row), decays weights, keeps the moments of half-precision parameters in float32, and does not
    lose their small updates to rounding.

    Args:
        params: parameters or parameter groups, see `param_groups`; each group may set lr, betas,
            eps, weight_decay, maximize and rounding.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        maximize: go up the gradient.
        weight_decay: decoupled, on touched rows only: a row shrinks by 1 - lr · weight_decay.
        rounding: how bfloat16 and float16 parameters take an update: "stochastic" rounds up or
            down at random so that updates too small to see add up all the same; "master" keeps a
            float32 copy; "nearest" is torch's, which loses such updates. Float32 is not rounded.
        seed: of stochastic rounding.

    Raises:
        TypeError: if a parameter is sparse or not floating.
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        self._seed = seed
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "rounding": rounding,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does, after a check of its options."""
        options = {**self.defaults, **param_group}
        check_positive("lr", float(options["lr"]))
        check_positive("eps", options["eps"])
        for beta in options["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"betas is {options['betas']}, but each must lie in [0, 1)")
        if options["weight_decay"] < 0:
            raise ValueError(f"weight_decay is {options['weight_decay']}, but must be at least 0")
        if options["rounding"] not in _ROUNDINGS:
            raise ValueError(
                f"rounding is {options['rounding']!r}, but must be one of {', '.join(_ROUNDINGS)}"
            )
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_sparse or not param.is_floating_point():
                raise TypeError(
                    "params must be dense floating tensors, but one has dtype "
                    f"{param.dtype} and layout {param.layout}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step on every parameter that has a gradient.

        A NaN in a gradient reaches the row it belongs to, and no other.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            ValueError: if a parameter's state is on another device, or of another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)
        return loss

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(param, group)
        state["step"] += 1
        if param.grad is None or param.grad.numel() == 0:
            return
        table = _as_table(param)
        if param.grad.is_sparse:
            rows, grad_rows = _rows_and_values(param.grad)
            if rows.numel() == 0:
                return
        else:
            rows, grad_rows = torch.arange(table.shape[0], device=param.device), param.grad
        beta1, beta2 = group["betas"]
        implementation(table).sparse_adam(
            table,
            _as_table(state["exp_avg"]),
            _as_table(state["exp_avg_sq"]),
            rows,
            _as_table(grad_rows.contiguous()),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=state["step"],
            maximize=group["maximize"],
            stochastic_rounding=group["rounding"] == "stochastic",
            seed=self._seed,
            master=_as_table(state["master"]) if "master" in state else None,
        )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            dtype = torch.float32 if param.dtype in _HALF else param.dtype
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.contiguous_format
                )
            if group["rounding"] == "master" and param.dtype in _HALF:
                state["master"] = param.detach().to(torch.float32).contiguous()
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].device != param.device or state[name].shape != param.shape:
                raise ValueError(
                    f"state {name!r} has shape {list(state[name].shape)} on "
                    f"{state[name].device}, but its parameter has {list(param.shape)} on "
                    f"{param.device}"
                )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; moments stay in float32, where torch would cast them.

        Raises:
            ValueError: if groups do not fit, or a moment has another shape than its parameter.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        kept = dict(zip(ids, params, strict=False))
        for index, state in state_dict["state"].items():
            for name in ("exp_avg", "exp_avg_sq", "master"):
                if name in state and index in kept and state[name].shape != kept[index].shape:
                    raise ValueError(
                        f"state_dict: {name!r} of parameter {index} has shape "
                        f"{list(state[name].shape)}, but the parameter has "
                        f"{list(kept[index].shape)}"
                    )
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # torch's SparseAdam knows fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for index, state in state_dict["state"].items():
            param = kept[index]
            if param.dtype in _HALF:
                for name in ("exp_avg", "exp_avg_sq", "master"):
                    if name in state:
                        self.state[param][name] = state[name].to(
                            device=param.device, dtype=torch.float32, copy=True
                        )


def _as_table(tensor: Tensor) -> Tensor:
    """A view of two dimensions, rows first."""
    if tensor.ndim == 2:
        return tensor
    return tensor.view(tensor.shape[0], -1) if tensor.ndim else tensor.view(1, 1)


def _rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, each once, and their gradient."""
    if grad.sparse_dim() != 1:
        raise ValueError(
            f"a sparse gradient must have 1 sparse dimension, its rows, not {grad.sparse_dim()}"
        )
    rows = grad._indices()[0]
    # Accumulating a gradient loses torch's mark that it is coalesced; sorting it again would
    # cost as much as the step.
    if not grad.is_coalesced() and bool((rows[1:] <= rows[:-1]).any()):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


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
        if parameter.grad.is_sparse:
            rows, grad_rows = _rows_and_values(parameter.grad)
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
