"""Operators of torch.library: how the ops register theirs."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("pkm_triton", "DEF")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator from its schema, the function that runs it, and its shapes."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.pkm_triton, name).default
    torch.library.register_fake(f"pkm_triton::{name}", fake, lib=_LIBRARY)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
        _LIBRARY.impl(name, functools.partial(_without_autocast, op, key.lower()), f"Autocast{key}")
    return op


def _without_autocast(op: Any, device: str, *args: Any) -> Any:
    """The ops state their own precision; autocast must not lower it inside them."""
    with torch.autocast(device, enabled=False):
        return op(*args)


def register_with_gradient(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> Any:
    """As `register`, with the gradient that `save` (for backward) and `backward` make.

    It is an operator of its own because of what passing through autograd costs a call that wants
    no gradient: 11 of 48 µs, measured, which shows when one token is decoded at a time.
    """
    op = register(schema, run, fake)
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=_LIBRARY)
    return op


def refuse_second_gradient(op: Any) -> None:
    """Make the gradient of `op`, itself the gradient of another, an error."""

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{op.name()}: the ops are differentiable once, not twice")

    torch.library.register_autograd(op.name(), refuse, lib=_LIBRARY)
