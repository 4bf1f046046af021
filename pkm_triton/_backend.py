"""Which implementation the ops run: Triton kernels or the PyTorch reference."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
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


_start: Backend = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
# The choices made for good, the last in force, among them for a moment those of blocks that are
# about to be entered; and the blocks that are open in this context.
_for_good: "deque[use_backend]" = deque(maxlen=64)
_open: "ContextVar[tuple[use_backend, ...]]" = ContextVar("_open", default=())


def backend() -> Backend:
    """The backend in force: "auto" (Triton for GPU tensors, else torch), "triton" or "torch"."""
    blocks = _open.get()
    in_backward = torch._C._current_graph_task_id() != -1
    if not blocks and in_backward and torch._C._is_key_in_tls("context"):
        # Perhaps in a thread of autograd's, to which torch hands the context of the caller.
        blocks = torch._C._get_obj_in_tls("context").get(_open, ())
    if blocks:
        return blocks[-1].name
    return _for_good[-1].name if _for_good else _start


class use_backend:
    """Choose the backend from here on, or inside a `with` block.

    A call alone chooses for the whole process, in every thread. A `with` block chooses for its own
    thread (or task), and for the backward passes that are called in it, whatever thread of
    autograd's they run in; blocks may be nested, entered again, and left in any order.

    Args:
        name: "auto" runs the Triton kernels on GPU tensors and the PyTorch reference on others;
            "triton" runs the kernels, on CPU tensors too if a Triton driver takes them (its
            interpreter does: set TRITON_INTERPRET=1 before the first import); "torch" runs the
            reference everywhere. The environment variable PKM_TRITON_BACKEND sets the start.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, name: Backend) -> None:
        self.name: Backend = _checked(name, "backend")
        _for_good.append(self)

    def __enter__(self) -> "use_backend":
        with suppress(ValueError):  # entered before
            _for_good.remove(self)
        _open.set((*_open.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Its own entry, wherever it is: a generator may be closed after blocks opened since.
        blocks = list(_open.get())[::-1]
        with suppress(ValueError):  # closed in another context than it was opened in
            blocks.remove(self)
        _open.set(tuple(blocks[::-1]))


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
    current = backend()
    if current != "triton" and not tensors[0].is_cuda:
        return reference
    device = tensors[0].device
    has_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if current == "triton":
        if has_float64:
            raise TypeError(
                "backend 'triton' takes float32, bfloat16 and float16; use_backend('torch') or "
                "'auto' for float64"
            )
        obstacle = _obstacle(device)
        if obstacle is not None:
            raise RuntimeError(f"backend 'triton' was asked for, but {obstacle}")
        return OnDevice(importlib.import_module("pkm_triton.kernels"), device)
    if current == "torch" or has_float64:
        return reference
    obstacle = _obstacle(device)
    if obstacle is not None:
        _warn(obstacle)
        return reference
    return OnDevice(importlib.import_module("pkm_triton.kernels"), device)
