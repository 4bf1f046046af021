"""The library of operators: `torch.compile` and `torch.export` see each as a single node.

They carry schemas, devices and shapes, and nothing of derivatives: one registered with an operator
would fail under `torch.func.grad`, and be zero under `torch.func.jvp`. Those are the business of
the `torch.autograd.Function`s outside of them.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch


def _library() -> torch.library.Library:
    """The library, made once in a process: this module may be imported again, or reloaded."""
    namespace: Any = torch.ops.pkm_triton
    if "library" not in vars(namespace):
        namespace.library = torch.library.Library("pkm_triton", "DEF")
    return namespace.library


LIBRARY = _library()


def is_defined(name: str) -> bool:
    """Whether an earlier import of this package defined that operator."""
    return hasattr(torch.ops.pkm_triton, name)


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator from its schema, the function that runs it, and its shapes."""
    name = schema.partition("(")[0]
    if not is_defined(name):
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.pkm_triton, name).default
    torch.library.register_fake(f"pkm_triton::{name}", fake, lib=LIBRARY, allow_override=True)
    with warnings.catch_warnings():
        # Torch warns of what `allow_override` asks for, at the first override of a process.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for device in ("CPU", "CUDA", "MPS", "XPU"):
            LIBRARY.impl(name, run, device, allow_override=True)
            in_full = functools.partial(_without_autocast, op, device.lower())
            LIBRARY.impl(name, in_full, f"Autocast{device}", allow_override=True)
    return op


def _without_autocast(op: Any, device: str, *args: Any) -> Any:
    """The ops state their own precision; autocast must not lower it inside them."""
    with torch.autocast(device, enabled=False):
        return op(*args)
