"""Optimisation with sparse gradients: Adam on the rows that were read, and gradient clipping."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._backend import implementation
from ._checks import check_integer, check_positive
from .clipping import clip_grad_norm_
from .gradients import FactoredGradient, rows_and_values

__all__ = ["SparseAdam", "clip_grad_norm_"]

Rounding = Literal["stochastic", "master", "nearest"]
_ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "master", "nearest")
_HALF = (torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")


class SparseAdam(torch.optim.Optimizer):
    """Adam on the rows that were read: a drop-in for `torch.optim.SparseAdam`.

    The moments and the values of a row change only in steps in which its gradient is there, in one
    pass over those rows. Beyond torch's it takes dense gradients too (a step of Adam on every
    row), decays weights, keeps the moments of half-precision parameters in float32, and does not
    lose their small updates to rounding. From a gradient that is kept as its factors
    (`sparse_grad="factored"`) it makes the step row by row, as the rows' gradient is made, which is
    never stored.

    Args:
        params: parameters or parameter groups, see `param_groups`; each group may set all options
            below.
        lr: learning rate; if capturable it may be a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        maximize: go up the gradient.
        weight_decay: decoupled, on touched rows only: a row shrinks by 1 - lr · weight_decay.
        rounding: how bfloat16 and float16 parameters take an update: "stochastic" rounds up or
            down at random so that updates too small to see add up all the same; "master" keeps a
            float32 copy; "nearest" is torch's, which loses such updates. Float32 is not rounded.
        seed: of stochastic rounding. Same seed, gradients and start, same bits.
        capturable: count steps on the parameters' device, so that a step of dense gradients, or of
            those kept as factors, can be captured in a CUDA graph.

    Raises:
        TypeError: if a parameter is sparse or not floating.
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does, after a check of its options."""
        options = {**self.defaults, **param_group}
        if isinstance(options["lr"], Tensor) and not options["capturable"]:
            raise ValueError("lr is a tensor, but may be one only if capturable is True")
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
        check_integer("seed", options["seed"], 0)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_sparse or not param.is_floating_point():
                raise TypeError(
                    "params must be dense floating tensors, but one has dtype "
                    f"{param.dtype} and layout {param.layout}"
                )

    # Not compiled, as torch's is not: counts and states are no constants. This is how torch.optim
    # says so; `torch.compiler.disable` imports the compiler, and with it numpy, at once.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step on every parameter that has a gradient.

        A NaN in a gradient reaches the element it belongs to, and no other; as in torch, no step
        is skipped for it (`GradScaler` skips one).

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            TypeError: if a gradient is sparse, but not COO.
            ValueError: if a parameter's state is on another device, or of another shape, or a
                sparse gradient has not 1 sparse dimension.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, param.grad, group)
        return loss

    def _step_one(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"a gradient has layout {grad.layout}, but must be dense or sparse COO")
        state = self._state_of(param, group)
        state["step"] += 1
        if param.numel() == 0:
            return
        beta1, beta2 = group["betas"]
        options = {
            "lr": group["lr"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "step": state["step"],
            "maximize": group["maximize"],
            "stochastic_rounding": group["rounding"] == "stochastic" and param.dtype in _HALF,
            "seed": group["seed"],
            "master": _as_table(state["master"]) if "master" in state else None,
        }
        table = _as_table(param.contiguous())
        tables = table, _as_table(state["exp_avg"]), _as_table(state["exp_avg_sq"])
        if isinstance(grad, FactoredGradient):
            reads = grad.merged()
            if reads.slots.numel() > 0:
                implementation(table, reads.weights).scatter_adam(
                    *tables, reads.grad_output, reads.slots, reads.weights, **options
                )
        else:
            if grad.is_sparse:
                rows, grad_rows = rows_and_values(grad)
            else:
                rows, grad_rows = torch.arange(table.shape[0], device=param.device), grad
            if rows.numel() > 0:
                implementation(table).sparse_adam(
                    *tables, rows, _as_table(grad_rows.contiguous()), **options
                )
        if not param.is_contiguous():
            param.copy_(table.view(param.shape))

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            dtype = torch.float32 if param.dtype in _HALF else param.dtype
            state["step"] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.contiguous_format
                )
        if group["capturable"] and not isinstance(state["step"], Tensor):
            state["step"] = torch.full((), float(state["step"]), device=param.device)
        if not group["capturable"] and isinstance(state["step"], Tensor):
            state["step"] = int(state["step"])
        if group["rounding"] == "master" and param.dtype in _HALF and "master" not in state:
            state["master"] = param.detach().to(torch.float32).contiguous()
        for name in (*_MOMENTS, "master"):
            tensor = state.get(name)
            if tensor is None:
                continue
            if tensor.device != param.device or tensor.shape != param.shape:
                raise ValueError(
                    f"state {name!r} has shape {list(tensor.shape)} on {tensor.device}, but its "
                    f"parameter has {list(param.shape)} on {param.device}"
                )
            state[name] = tensor.contiguous()
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
            for name in (*_MOMENTS, "master"):
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
                for name in (*_MOMENTS, "master"):
                    if name in state:
                        self.state[param][name] = state[name].to(
                            device=param.device, dtype=torch.float32, copy=True
                        )


def _as_table(tensor: Tensor) -> Tensor:
    """A view of two dimensions, rows first."""
    if tensor.ndim == 2:
        return tensor
    return tensor.view(tensor.shape[0], -1) if tensor.ndim else tensor.view(1, 1)
