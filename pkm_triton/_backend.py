"""Which implementation the ops run: Triton kernels or the PyTorch reference."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType, TracebackType
from typing import Literal, get_args

import torch

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
def _warn_without_triton() -> None:
    warnings.warn(
        "triton is not installed: GPU tensors run the PyTorch reference, which is slower "
        "(pip install triton)",
        stacklevel=2,
    )


def implementation(device: torch.device) -> ModuleType:
    """The module whose functions run for tensors on `device`: `kernels` or `reference`.

    Raises:
        RuntimeError: if "triton" was asked for and triton is missing or has no driver for the
            device's tensors.
    """
    if _current == "torch" or (_current == "auto" and device.type == "cpu"):
        return importlib.import_module("pkm_triton.reference")
    if not triton_is_installed():
        if _current == "auto":
            _warn_without_triton()
            return importlib.import_module("pkm_triton.reference")
        raise RuntimeError("backend 'triton' was asked for, but triton is not installed")
    return importlib.import_module("pkm_triton.kernels")
