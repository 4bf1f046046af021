"""Checkpoints of sharded models by `torch.distributed.checkpoint` (DCP).

DCP saves a `state_dict` of a sharded model, and of its optimisers by its `get_state_dict`, and
loads it bitwise into another number of ranks, another layout, or one process. A rank holds no more
of a table than two of the shards that were saved, beside its own: of what one process has saved the
whole table (`load_with_memory` reads a file without that). DCP writes into the folder it is given
file by file, so that a save that is killed would spoil what was there. Here are folders in which it
does not.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed

from .agreement import together

# What DCP writes last, by a rename, once every rank has written its part.
_COMPLETE = ".metadata"


def new_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Where to save next: `dcp.save(state, checkpoint_id=new_checkpoint(folder))`.

    The newest complete checkpoint stays; older ones, and what killed saves left, are removed. With
    `dcp.async_save` wait for the last save before. All ranks must call.

    Args:
        folder: of these checkpoints alone; made if it is not there. All ranks must see the same.

    Returns:
        A path in it at which there is nothing yet, the same on all ranks.

    Raises:
        OSError: on all ranks, if rank 0 cannot make or clear the folder.
    """

    def decide() -> Path:
        Path(folder).mkdir(parents=True, exist_ok=True)
        found = _numbered(folder)
        newest = max(filter(_is_complete, found), key=_number, default=None)
        for old in found:
            if old != newest:
                # First what says that it is complete.
                (old / _COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(old)
        return Path(folder, f"{1 + max(map(_number, found), default=0):06d}")

    return _by_first_rank(decide)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of `new_checkpoint`, or None; the same on all ranks.

    `dcp.load(state, checkpoint_id=latest_checkpoint(folder))`. All ranks must call.

    Args:
        folder: that of `new_checkpoint`; it need not be there.

    Raises:
        OSError: on all ranks, if rank 0 cannot read the folder.
    """

    def decide() -> Path | None:
        return max(filter(_is_complete, _numbered(folder)), key=_number, default=None)

    return _by_first_rank(decide)


def _numbered(folder: str | os.PathLike[str]) -> list[Path]:
    if not Path(folder).exists():
        return []
    return [each for each in Path(folder).iterdir() if each.name.isdecimal() and each.is_dir()]


def _number(path: Path) -> int:
    return int(path.name)


def _is_complete(path: Path) -> bool:
    return (path / _COMPLETE).exists()


def _by_first_rank(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, or raises, on all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return decide()
    first = distributed.get_rank() == 0
    decision = [together(lambda: decide() if first else None, None)]
    distributed.broadcast_object_list(decision, src=0)
    return decision[0]
