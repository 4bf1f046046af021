"""Checks of what layers are built from: devices, dtypes, flags, lists of widths."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import FLOATING_DTYPES, check_integer


def check_device(device: torch.device | str | int | None) -> None:
    """`device` is None, or one that this machine has."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"device is {device!r}, but must be one that this machine has: {error}"
        ) from None


def check_dtype(dtype: torch.dtype | None) -> None:
    """`dtype` is None or one of those that parameters may have."""
    if dtype is None or dtype in FLOATING_DTYPES:
        return
    allowed = ", ".join(str(each) for each in FLOATING_DTYPES)
    raise TypeError(f"dtype is {dtype!r}, but must be None or one of {allowed}")


def check_flag(name: str, value: bool) -> bool:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, but must be True or False")
    return value


def check_path(path: str | os.PathLike[str]) -> Path:
    """`path` names a file or a folder; returned as a `Path`."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a name or a Path, not {path!r}")
    return Path(path)


def check_module(name: str, module: nn.Module) -> None:
    """`module` is a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a module, not {type(module).__name__}")


def check_group(group: Any) -> None:
    """`group` is None or a process group, of which this rank is one."""
    kind = getattr(torch.distributed, "ProcessGroup", None)  # not where torch is built without
    if group is not None and (kind is None or not isinstance(group, kind)):
        raise TypeError(f"group is {group!r}, but must be None or a ProcessGroup with this rank")


def check_widths(name: str, widths: Iterable[int]) -> tuple[int, ...]:
    """`widths` is a sequence of integers of at least 1; returned as a tuple of ints."""
    return tuple(check_integer(name, width, 1) for width in check_list(name, widths))


def check_list(name: str, numbers: Iterable[int]) -> Iterable[int]:
    """`numbers` can be gone through; what it holds is not looked at."""
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, such as (6, 12), not {numbers!r}")
    return numbers


def make_module(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make_memory` makes: a module."""
    if not callable(make):
        raise TypeError(f"make_memory must be a function, not {type(make).__name__}")
    made = make()
    if not isinstance(made, nn.Module):
        raise TypeError(f"make_memory must return a module, not {type(made).__name__}")
    return made


def check_meets(x: Tensor, first: nn.Module) -> None:
    """Tokens `x` can meet the first map of a query network."""
    if type(first) is not nn.Linear:
        return  # adapters and quantised maps see to dtypes and devices themselves
    weight = first.weight
    if (x.device == weight.device and x.dtype == weight.dtype) or hasattr(first, "_hf_hook"):
        return  # the hook brings an offloaded map to its tokens
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but must be on {weight.device}, as the layer is")
    if torch.float64 in (x.dtype, weight.dtype) or not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"x has dtype {x.dtype}, but must have the query network's, {weight.dtype} "
            "(torch.autocast takes others)"
        )
