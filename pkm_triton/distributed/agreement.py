"""Ranks that disagree are found before a collective waits for what will never come."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .gathering import sizes_of_all

_T = TypeVar("_T")


def agreed(describe: Callable[[], dict[str, Any]], *groups: Any) -> dict[str, Any]:
    """What `describe` returns, once it is known that it does the same on all ranks.

    Args:
        describe: what to call; names and what they are.
        *groups: the process group; of a mesh, those of its dimensions, the last one first.

    Raises:
        ValueError: on every rank, if it raised an error on one (see `together`), or ranks differ.
    """
    mine, said = _called(describe, groups, lambda description: description)
    first, expected = said[0]
    for rank, theirs in said:
        for name in [*expected, *(theirs.keys() - expected)]:
            ours, other = (each.get(name, "none") for each in (expected, theirs))
            if other != ours:
                raise ValueError(
                    f"ranks differ in {name}: rank {rank} has {other}, rank {first} has {ours}"
                )
    return mine


def together(call: Callable[[], _T], group: Any) -> _T:
    """What `call` returns, once it is known that it does on all ranks.

    Raises:
        ValueError, OSError: on every rank, if it raised one, or a TypeError, on one of them.
    """
    return _called(call, [group], lambda _: None)[0]


def _called(
    call: Callable[[], _T], groups: Sequence[Any], tell: Callable[[_T], Any]
) -> tuple[_T, list[tuple[int, Any]]]:
    """What `call` returns here, and what all ranks tell of it, each beside its number."""
    mine: Any = None
    error = None
    try:
        mine = call()
    except (ValueError, TypeError, OSError) as raised:
        error = raised
    kind = OSError if isinstance(error, OSError) else ValueError
    told = (None, None, tell(mine)) if error is None else (kind, str(error), None)
    said: list[Any] = [(distributed.get_rank(), *told)]
    for group in groups:
        of_ranks: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(of_ranks, said, group=group)
        said = [each for of_rank in of_ranks for each in of_rank]
    if error is not None:
        raise error
    for rank, kind, message, _ in said:
        if kind is not None:
            raise kind(f"rank {rank} refuses: {message}")
    return mine, [(rank, theirs) for rank, *_, theirs in said]


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
