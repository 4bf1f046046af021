"""Kernels run where their tensors are.

Triton launches on the device that is current, on its current stream, and torch.library makes none
current: for a tensor on another device the launch would go to the wrong one.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one, if it is of a kind that has one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class OnDevice:
    """The functions of a module, each run with a device made current for the call."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module = module
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(_run, getattr(self._module, name), self._device)


def _run(function: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> Any:
    with made_current(device):
        return function(*args, **kwargs)
