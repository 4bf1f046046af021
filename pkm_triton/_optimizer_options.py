"""Checks of optimisers' options: a user's mistake is named, with its value and what is allowed."""

import math
from numbers import Real
from typing import Any, Literal

from torch import Tensor

Rounding = Literal["stochastic", "master", "nearest"]
_ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "master", "nearest")


def check_number(name: str, value: Any, *, above: float | None = None, below: float = math.inf):
    """`value` is a finite number, at least 0 or greater than `above`, and less than `below`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    number = float(value)
    least = number > above if above is not None else number >= 0
    if not (least and number < below):
        allowed = "at least 0" if above is None else f"above {above:g}"
        ending = f" and below {below:g}" if math.isfinite(below) else ", and finite"
        raise ValueError(f"{name} is {value}, but must be {allowed}{ending}")


def check_learning_rate(lr: Any) -> None:
    """`lr` is a finite number of at least 0, or a tensor of one such element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                "lr must be a number or a floating tensor of one element, not a tensor of shape "
                f"{list(lr.shape)} and dtype {lr.dtype}"
            )
        if lr.is_meta:
            raise ValueError("lr is a tensor on the meta device, which has no value")
        lr = float(lr)
    check_number("lr", lr)


def check_betas(betas: Any) -> None:
    """`betas` are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, not {betas!r}")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, below=1)


def check_flag(name: str, value: Any) -> None:
    """`value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_rounding(rounding: Any) -> None:
    """`rounding` is one of those there are."""
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, but must be one of {', '.join(_ROUNDINGS)}")
