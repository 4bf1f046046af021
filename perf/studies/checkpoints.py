"""What a training goes on from: a file, or, of tables over ranks, a folder that all ranks write.

The folder is one of `torch.distributed.checkpoint`: any number of ranks, with either layout, goes
on from it. A write that is killed leaves the old checkpoint, of both kinds.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pkm_triton.checkpoints import read_tensors, write_tensors
from pkm_triton.distributed import latest_checkpoint, new_checkpoint
from pkm_triton.optim import SparseAdam
from pkm_triton.perf.measure.ranks import Ranks

_FORMAT, _VERSION = "pkm_triton training checkpoint", 2

Optimisers = Sequence[torch.optim.Optimizer]


def exists(path: Path, ranks: Ranks) -> bool:
    """Whether there is a checkpoint of that name.

    Raises:
        ValueError: if there is one, but of the other kind.
    """
    here, other = path, _folder(path)
    if ranks.together:
        here, other = other, here
    if other.exists() and not here.exists():
        raise ValueError(
            f"shard: {str(other)!r} is of a training {'without' if ranks.together else 'with'} it; "
            "give another --output, or remove that"
        )
    return latest_checkpoint(here) is not None if ranks.together else here.exists()


def remove(path: Path) -> None:
    """Remove a checkpoint of either kind, if there is one."""
    path.unlink(missing_ok=True)
    shutil.rmtree(_folder(path), ignore_errors=True)


def save(
    path: Path, about: dict[str, Any], model: nn.Module, optimisers: Optimisers, ranks: Ranks
) -> None:
    """Write plain data, a model, its optimisers and torch's random state.

    Of tables over ranks each writes its own, of others rank 0 all; the others wait.

    Raises:
        OSError: the file cannot be written.
    """
    if ranks.together:
        state = _state(model, optimisers) | {"about": json.dumps(about)}
        folder = new_checkpoint(_folder(path))
        with _raised(OSError, f"{str(folder)!r} cannot be written"):
            state_dict_saver.save(state, checkpoint_id=folder)
        return
    if ranks.rank == 0:
        # A study of another process may have found it empty, and removed it.
        path.parent.mkdir(exist_ok=True)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            **about,
            "model": model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        write_tensors(path, content)
    ranks.wait()


class Saved:
    """A checkpoint.

    Args:
        path: its name.
        ranks: those that read it.

    Attributes:
        path: the file, or the newest folder.
        about: the plain data.

    Raises:
        ValueError: if it is broken, there or as it is restored.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        folder = latest_checkpoint(_folder(path)) if ranks.together else None
        self.path, self._is_file = folder or path, folder is None
        if self._is_file:
            self.about = read_tensors(path, _FORMAT, _VERSION, plain=1)
            return
        state = {"about": ""}
        self._load(state)
        self.about: dict[str, Any] = json.loads(state["about"])

    def restore(self, model: nn.Module, optimisers: Optimisers) -> None:
        """Give a model, its optimisers and torch's generators what was saved."""
        if self._is_file:
            model.load_state_dict(self.about["model"])
            for optimiser, part in zip(optimisers, self.about["optimisers"], strict=True):
                optimiser.load_state_dict(part)
            random, random_cuda = self.about["random"], self.about["random_cuda"]
            if random_cuda and torch.cuda.is_initialized():
                torch.cuda.set_rng_state_all(random_cuda)
        else:
            for optimiser in optimisers:
                if isinstance(optimiser, SparseAdam):
                    optimiser.init_state()
            state = _state(model, optimisers)
            self._load(state)
            set_state_dict(
                model,
                optimisers,
                model_state_dict=state["model"],
                optim_state_dict=state["optimisers"],
            )
            random = state["random"]
            if torch.cuda.is_initialized():
                torch.cuda.set_rng_state(state["random_cuda"])
        torch.set_rng_state(random)

    def _load(self, state: dict[str, Any]) -> None:
        with _raised(ValueError, f"checkpoint: {str(self.path)!r} is broken"):
            state_dict_loader.load(state, checkpoint_id=self.path)


@contextlib.contextmanager
def _raised(kind: type[Exception], what: str) -> Iterator[None]:
    """In place of what tells of the failures of all ranks, and is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise kind(f"{what}: rank {rank}: {reason}") from error


def _state(model: nn.Module, optimisers: Optimisers) -> dict[str, Any]:
    parameters, states = get_state_dict(model, optimisers)
    state = {"model": parameters, "optimisers": states, "random": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["random_cuda"] = torch.cuda.get_rng_state()
    return state


def _folder(path: Path) -> Path:
    """Where tables over ranks are saved, beside the file of that name."""
    return path.with_suffix("")
