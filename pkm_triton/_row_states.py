"""States of rows as they are loaded: checked, and kept in full precision."""

from typing import Any

import torch
from torch import Tensor


class RowStates:
    """What a state dictionary holds of an optimiser's rows, taken out of torch's hands.

    torch would cast the states of a half-precision parameter to its dtype.

    Args:
        optimiser: the `RowOptimizer` that loads.
    """

    def __init__(self, optimiser: Any) -> None:
        self._optimiser = optimiser
        self._names = (*optimiser.state_names, "master")
        self._taken: list[tuple[Tensor, dict[str, Any]]] = []

    def take(self, _: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check a state dictionary; returns it without these states."""
        rest = dict(state_dict["state"])
        for group in state_dict["param_groups"]:
            self._optimiser.check_all_options(self._optimiser.defaults | group)
        for param, index, state in self._by_parameter(state_dict):
            states = {name: state[name] for name in self._names if name in state}
            for name, each in states.items():
                master = name == "master"
                shape = param.shape if master else self._optimiser.state_shape(name, param)
                if each.shape != shape:
                    raise ValueError(
                        f"state_dict: {name!r} of parameter {index} has shape "
                        f"{list(each.shape)}, but must have {list(shape)}"
                    )
            self._taken.append((param, states))
            rest[index] = {name: each for name, each in state.items() if name not in states}
        return {**state_dict, "state": rest}

    def put(self, _: Any) -> None:
        """Give the optimiser the states, and the options that a dictionary of torch's lacks."""
        for group in self._optimiser.param_groups:
            for name, value in self._optimiser.defaults.items():
                group.setdefault(name, value)
        for param, states in self._taken:
            dtype = torch.promote_types(param.dtype, torch.float32)
            for name, each in states.items():
                self._optimiser.state[param][name] = each.to(device=param.device, dtype=dtype)

    def _by_parameter(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Any, dict[str, Any]]]:
        """Parameters, their index and state in a dictionary of the same groups."""
        params = [param for group in self._optimiser.param_groups for param in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        known = dict(zip(ids, params, strict=False))
        states = state_dict["state"].items()
        return [(known[index], index, state) for index, state in states if index in known]
