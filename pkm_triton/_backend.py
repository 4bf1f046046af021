"""Which implementation the ops run: Triton kernels or the PyTorch reference."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType, TracebackType
from typing import Literal, get_args

import torch
from torch import Tensor

from . import reference
from ._devices import OnDevice

Backend = Literal["auto", "triton", "torch"]
_BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "PKM_TRITON_BACKEND"


def _checked(name: str, source: str) -> Backend:
    for allowed in _BACKENDS:
        if name == allowed:
            return allowed
    raise ValueError(f"{source} is {name!r}, but must be one of {', '.join(_BACKENDS)}")


# A plain global, not a thread's or a context's: autograd runs backward passes in other threads,
# and those must follow the same choice.
_current: Backend = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def backend() -> Backend:
    """The backend in force: "auto" (Triton for GPU tensors, else torch), "triton" or "torch"."""
    return _current


class use_backend:
    """Choose the backend from here on, or inside a `with` block.

    Args:
        name: "auto" runs the Triton kernels on GPU tensors and the PyTorch reference on others;
            "triton" runs the kernels, on CPU tensors too if a Triton driver takes them (its
            interpreter does: set TRITON_INTERPRET=1 before the first import); "torch" runs the
            reference everywhere. The environment variable PKM_TRITON_BACKEND sets the start.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, name: Backend) -> None:
        global _current
        chosen = _checked(name, "backend")
        self._previous: Backend = _current
        _current = chosen

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        _current = self._previous


@functools.cache
def triton_is_installed() -> bool:
    """Whether `import triton` would find a package; does not import it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device`, and what to do; None if nothing."""
    if not triton_is_installed():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < (8, 0):
            return (
                f"the GPU has compute capability {capability[0]}.{capability[1]}, but the kernels "
                "need 8.0 or higher"
            )
        return None
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return None
    try:
        driver.active.get_current_target()
    except RuntimeError:
        return (
            f"triton has no driver for tensors on {device}: move them to a GPU, or set "
            "TRITON_INTERPRET=1 in the environment before Python starts to have the kernels "
            "interpreted, which is slow"
        )
    return None


@functools.cache
def _warn(obstacle: str) -> None:
    warnings.warn(
        f"{obstacle}; tensors on the GPU run the PyTorch reference, which is slower", stacklevel=2
    )


def implementation(*tensors: Tensor) -> ModuleType | OnDevice:
    """The functions that run for these tensors: those of `kernels` or of `reference`.

    The kernels are launched on the tensors' device, whichever is current. Under "auto" the
    reference takes tensors that are not on a GPU, float64, and, with one warning, what Triton
    cannot run.

    Raises:
        RuntimeError: if "triton" was asked for and cannot run.
        TypeError: if "triton" was asked for and a tensor is float64.
    """
    if _current != "triton" and not tensors[0].is_cuda:
        return reference
    device = tensors[0].device
    has_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if _current == "triton":
        if has_float64:
            raise TypeError(
                "backend 'triton' takes float32, bfloat16 and float16; use_backend('torch') or "
                "'auto' for float64"
            )
        obstacle = _obstacle(device)
        if obstacle is not None:
            raise RuntimeError(f"backend 'triton' was asked for, but {obstacle}")
        return OnDevice(importlib.import_module("pkm_triton.kernels"), device)
    if _current == "torch" or has_float64:
        return reference
    obstacle = _obstacle(device)
    if obstacle is not None:
        _warn(obstacle)
        return reference
    return OnDevice(importlib.import_module("pkm_triton.kernels"), device)
