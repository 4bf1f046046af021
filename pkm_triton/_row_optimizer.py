"""What optimisers of the rows that were read have in common: all but the rule of a step.

An optimiser adds its state, its options and its rule (see `optim.SparseAdam`). Here are the forms
of a gradient, the counting of steps, half-precision parameters, and loading.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._backend import implementation
from ._checks import FLOATING_DTYPES, check_integer
from ._optimizer_options import check_flag, check_rounding
from ._row_states import RowStates
from .gradients import (
    FactoredGradient,
    Reads,
    check_sparse_gradient,
    local,
    rows_and_values,
)

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RowStep:
    """A step on one table, checked and ready to be made.

    Attributes:
        functions: what runs it: those of `kernels` or of `reference`.
        table: [K, d], the parameter; updated in place.
        states: [K, s] each, by their names, in float32 (float64 for float64); updated in place.
        step: how many steps there have been, this one included.
        rounding: how a half-precision table takes the step: keyword arguments of the functions.
        group: the options of the parameter's group.
    """

    functions: Any
    table: Tensor
    states: dict[str, Tensor]
    step: int | Tensor
    rounding: dict[str, Any]
    group: dict[str, Any]


class RowOptimizer(torch.optim.Optimizer):
    """Base of optimisers that update the rows that were read, and no others.

    Subclasses state `state_names`, check their own options, and make a step from the gradient of
    some rows and, if they can do better than that, from reads.
    """

    state_names: tuple[str, ...]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise for options of a group that are not the base's.

        Raises:
            TypeError: if one is of the wrong kind.
            ValueError: if one is out of range.
        """
        raise NotImplementedError

    def check_all_options(self, options: dict[str, Any]) -> None:
        """As `check_options`, of the base's too."""
        check_rounding(options["rounding"])
        check_flag("capturable", options["capturable"])
        check_integer("seed", options["seed"], 0)
        self.check_options(options)

    def state_shape(self, name: str, param: Tensor) -> torch.Size:
        """The shape of a state; that of the parameter unless overridden."""
        return param.shape

    def update_rows(self, step: RowStep, rows: Tensor | None, grad_rows: Tensor) -> None:
        """Make the step on `rows` [M], each once, of gradient [M, d]; None: all rows, in order."""
        raise NotImplementedError

    def update_reads(self, step: RowStep, reads: Reads) -> None:
        """Make the step from the reads of a gradient that is kept as its factors."""
        grad = FactoredGradient(step.table, [reads]).to_sparse()
        self.update_rows(step, *rows_and_values(grad))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does; a group that is refused is not kept."""
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            self.check_all_options(group)
            for param in group["params"]:
                _check_parameter(param)
        except BaseException:
            del self.param_groups[count:]
            raise

    # Not compiled, as torch's is not: counts and states are no constants. This is how torch.optim
    # says so; `torch.compiler.disable` imports the compiler, and with it numpy, at once.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Make one step on every parameter that has a gradient.

        All gradients are checked before the first parameter changes. A NaN in a gradient reaches
        the element it belongs to, and no other; as in torch, no step is skipped for it
        (`GradScaler` skips one).

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            The loss, if a closure was given.

        Raises:
            TypeError: if the backend that was asked for does not take the dtypes.
            ValueError: if a parameter's state is on another device, or of another shape, or a
                sparse gradient on the CPU has rows that the parameter has not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = []
        index = -1
        for group in self.param_groups:
            for param in group["params"]:
                index += 1
                if param.grad is not None:
                    todo.append((param, group, index, self._functions(param)))
        for each in todo:
            self._step_one(*each)
        return loss

    def _functions(self, param: Tensor) -> Any:
        """What runs the step of a parameter, after a check of its gradient and state."""
        assert param.grad is not None
        grad = local(param.grad)
        weights: list[Tensor] = []
        if isinstance(grad, FactoredGradient):
            weights = [part.weights for part in grad.reads]
        elif grad.is_sparse:
            check_sparse_gradient(grad)
        for name, tensor in self.state.get(param, {}).items():
            if name not in (*self.state_names, "master"):
                continue
            shape = param.shape if name == "master" else self.state_shape(name, param)
            if tensor.device != param.device or tensor.shape != shape:
                raise ValueError(
                    f"state {name!r} has shape {list(tensor.shape)} on {tensor.device}, but must "
                    f"have {list(shape)} on {param.device}, for its parameter"
                )
        return implementation(local(param), *weights)

    def _step_one(self, param: Tensor, group: dict[str, Any], index: int, functions: Any) -> None:
        state = self._state_of(param, group)
        assert param.grad is not None
        grad, mine = local(param.grad), local(param)
        number = state["step"] + 1
        if mine.numel() > 0:
            dense = mine.contiguous()
            if isinstance(grad, FactoredGradient):
                num_rows, rows, grad_rows = mine.shape[0], None, None
            elif grad.is_sparse:
                num_rows = math.prod(mine.shape[: grad.sparse_dim()])
                rows, grad_rows = rows_and_values(grad)
            else:
                num_rows = mine.shape[0] if mine.ndim else 1
                rows, grad_rows = None, _as_rows(grad.contiguous(), num_rows)
            step = RowStep(
                functions,
                _as_rows(dense, num_rows),
                {name: _as_rows(local(state[name]), num_rows) for name in self.state_names},
                number,
                self._rounding(param, state, num_rows, group, index),
                group,
            )
            if isinstance(grad, FactoredGradient):
                reads = grad.merged()
                if reads.slots.numel() > 0:
                    self.update_reads(step, reads)
            elif grad_rows is not None and grad_rows.shape[0] > 0:
                self.update_rows(step, rows, grad_rows)
            if dense is not mine:
                mine.copy_(dense)
        # Not before it is made: an interrupted step is not counted.
        if isinstance(number, Tensor):
            state["step"].copy_(number)
        else:
            state["step"] = number

    def _rounding(
        self, param: Tensor, state: dict[str, Any], num_rows: int, group: dict[str, Any], index: int
    ) -> dict[str, Any]:
        if param.dtype not in _HALF:
            return {}
        # Tables, or shards of one, that draw the same random numbers would be rounded alike.
        drawn = f"{group['seed']} {index}{_shard_of(param)}"
        key = hashlib.blake2b(drawn.encode(), digest_size=8).digest()
        master = None
        if group["rounding"] == "master":
            master = _as_rows(local(state["master"]), num_rows)
        return {
            "stochastic_rounding": group["rounding"] == "stochastic",
            "seed": int.from_bytes(key, "big") >> 1,
            "master": master,
        }

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, made at its first step."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = 0
        if group["capturable"] and not isinstance(state["step"], Tensor):
            # Not of the default dtype: bfloat16 counts to 256.
            count = float(state["step"])
            state["step"] = torch.full((), count, dtype=torch.float32, device=param.device)
        if not group["capturable"] and isinstance(state["step"], Tensor):
            state["step"] = int(state["step"])
        for name in self.state_names:
            if name in state:
                state[name] = state[name].contiguous()
            else:
                dtype = torch.float32 if param.dtype in _HALF else param.dtype
                # Of the parameter's own shape also its layout over ranks.
                shape = self.state_shape(name, param)
                whole = shape == param.shape
                state[name] = (
                    torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
                    if whole
                    else param.new_zeros(shape, dtype=dtype)
                )
        if group["rounding"] == "master" and param.dtype in _HALF:
            master = state.get("master", param.detach())
            state["master"] = master.to(torch.float32).contiguous()
        return state

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter that trains, as its first step would.

        For `torch.distributed.checkpoint.state_dict.get_state_dict` before a first step, which
        otherwise makes states by a step with dense gradients of zeros, each as large as its table.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self._state_of(param, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; states stay in float32, where torch would cast them.

        Raises:
            ValueError: if groups do not fit, an option is out of range, or a state has another
                shape than it must have.
            TypeError: if an option is of the wrong kind.
        """
        loading = RowStates(self)
        # After the user's hooks that may change what is loaded, and before those that look at it.
        first = self.register_load_state_dict_pre_hook(loading.take)
        last = self.register_load_state_dict_post_hook(loading.put, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            last.remove()


def _check_parameter(param: Tensor) -> None:
    if param.layout != torch.strided or param.dtype not in FLOATING_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOATING_DTYPES)
        raise TypeError(
            f"params must be dense floating tensors ({allowed}), but one has dtype {param.dtype} "
            f"and layout {param.layout}"
        )


def _shard_of(param: Any) -> str:
    """Which shard of a DTensor this rank has, alike on ranks that have the same; else nothing."""
    if not hasattr(param, "placements"):
        return ""
    places = zip(param.device_mesh.get_coordinate(), param.placements, strict=True)
    return "".join(f" {place}" for place, placement in places if placement.is_shard())


def _as_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """A view of two dimensions, rows first."""
    return tensor.view(num_rows, tensor.numel() // num_rows)
