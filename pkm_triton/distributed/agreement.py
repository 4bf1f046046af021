"""Ranks that disagree are found before a collective waits for what will never come."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .gathering import sizes_of_all

_T = TypeVar("_T")


def agreed(describe: Callable[[], _T], group: Any) -> _T:
    """What `describe` returns, once it is known that it does the same on all ranks.

    Raises:
        ValueError: on every rank, if it raised an error on one (see `together`), or ranks differ.
    """
    mine, said = _called(describe, group, lambda description: description)
    for rank, theirs in enumerate(said):
        if theirs != said[0]:
            raise ValueError(
                f"ranks differ: rank {rank} of the group has {theirs}, rank 0 has {said[0]}"
            )
    return mine


def together(call: Callable[[], _T], group: Any) -> _T:
    """What `call` returns, once it is known that it does on all ranks.

    Raises:
        ValueError, OSError: on every rank, if it raised one, or a TypeError, on one of them.
    """
    return _called(call, group, lambda _: None)[0]


def _called(call: Callable[[], _T], group: Any, tell: Callable[[_T], Any]) -> tuple[_T, list[Any]]:
    """What `call` returns here, and what all ranks tell of it."""
    mine: Any = None
    error = None
    try:
        mine = call()
    except (ValueError, TypeError, OSError) as raised:
        error = raised
    said: list[Any] = [None] * distributed.get_world_size(group)
    kind = OSError if isinstance(error, OSError) else ValueError
    told = (None, None, tell(mine)) if error is None else (kind, str(error), None)
    distributed.all_gather_object(said, told, group=group)
    if error is not None:
        raise error
    for rank, (kind, message, _) in enumerate(said):
        if kind is not None:
            raise kind(f"rank {rank} of the group refuses: {message}")
    return mine, [theirs for *_, theirs in said]


def tokens_of_all(slots: Tensor, weights: Tensor, records: bool, group: Any) -> list[int]:
    """How many tokens each rank has; the host waits for them.

    Raises:
        ValueError: on every rank, if ranks differ in reads a token, the weights' dtype, or in
            whether they record gradients.
    """
    mine = [slots.shape[0], slots.shape[1], _DTYPES.index(weights.dtype), int(records)]
    sizes = sizes_of_all(mine, slots.device, group)
    for rank, theirs in enumerate(sizes):
        for what, first, here in zip(_WHAT, sizes[0][1:], theirs[1:], strict=True):
            if first != here:
                raise ValueError(
                    f"ranks differ in {what}: rank 0 of the mesh has {_said(what, first)}, "
                    f"rank {rank} {_said(what, here)}"
                )
    return [size[0] for size in sizes]


_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
_WHAT = "reads a token", "the dtype of weights", "whether gradients are recorded"


def _said(what: str, value: int) -> Any:
    return _DTYPES[value] if what == _WHAT[1] else bool(value) if what == _WHAT[2] else value
