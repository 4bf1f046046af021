"""Ranks under `torchrun`, or one alone: they share batches, and tables may lie over them."""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

import pkm_triton as pkm
from pkm_triton.distributed import average_gradients, shard_memory
from pkm_triton.perf.records.points import require_choice

LAYOUTS = ("columns", "rows")
TIMEOUT = 1800.0
GRACE = 5.0
"""Seconds, in which ranks that wait for a lost one all find that out."""


class Ranks:
    """The ranks that share every batch.

    Attributes:
        rank: this one, from 0.
        count: how many.
        layout: how the memories' values lie over them, as `columns` or `rows`, or None: all ranks
            have them whole.
    """

    def __init__(self, rank: int = 0, count: int = 1, layout: str | None = None) -> None:
        self.rank, self.count, self.layout = rank, count, layout
        if layout is not None:
            self._mesh = init_device_mesh(_device(), (count,))

    @property
    def together(self) -> bool:
        """Whether all ranks must call where the model is run or saved."""
        return self.layout is not None

    def share(self, model: nn.Module) -> None:
        """Give batch norm the tokens of all ranks; all have drawn the same parameters."""
        if self.count > 1:
            pkm.synchronise_batch_norm(model)

    def spread(self, memory: nn.Module, device: str) -> None:
        """Draw the parameters of a memory without data, its values over the ranks.

        The same values however many ranks there are, and in either layout; no rank ever has all.
        """
        layout: Any = self.layout
        shard_memory(memory, self._mesh, layout, equal_tokens=True)
        memory.to_empty(device=device)
        memory.reset_parameters()  # pyright: ignore[reportCallIssue]

    def average_gradients(self, model: nn.Module) -> None:
        """Make the model's gradients the means over all ranks, sparse ones as what they are."""
        if self.count > 1:
            average_gradients(model.parameters())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, on every rank, in float64."""
        total = values.to(torch.float64, copy=True)
        if self.count > 1:
            dist.all_reduce(total)
        return total / self.count

    def any(self, wish: bool) -> bool:
        """Whether rank 0 wishes it: all ranks get the same answer."""
        if self.count == 1:
            return wish
        answer = torch.tensor([int(wish)], device=_device())
        dist.broadcast(answer, src=0)
        return bool(answer.item())

    def wait(self) -> None:
        """Wait for all ranks."""
        if self.count > 1:
            dist.barrier()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that torchrun may start."""
    parser.add_argument(
        "--shard",
        metavar="LAYOUT",
        help=f"spread the memories' values over torchrun's ranks: {' or '.join(LAYOUTS)}",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="end all ranks of torchrun if one does not answer for so long (default: %(default)s)",
    )


@contextlib.contextmanager
def ranks_of_torchrun(
    device: str, layout: str | None = None, timeout: float = TIMEOUT
) -> Iterator[Ranks]:
    """The ranks that torchrun started, as a process group while the block lasts; or one alone.

    Args:
        device: `cpu` or `cuda`.
        layout: of the memories' values (see `Ranks`).
        timeout: seconds after which a rank that does not answer is taken for lost.

    Raises:
        ValueError: if the layout is unknown, torchrun has started none, or timeout is not above 0.
        ConnectionError: if a rank is lost while the block lasts; it is named.
    """
    if layout is not None:
        require_choice("shard", layout, LAYOUTS)
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"shard: {layout!r} needs ranks: torchrun --nproc-per-node 2 -m pkm_triton.perf ..."
            )
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout: {timeout} is not allowed; give seconds above 0")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 and layout is None:
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    try:
        yield Ranks(rank, count, layout)
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        lost = _lost(store, rank, count)
        if not lost:
            raise
        raise ConnectionError(
            f"rank {rank}: no answer from rank {' and '.join(map(str, lost))} of {count}; the same "
            "command goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _lost(store: Any, rank: int, count: int) -> list[int]:
    """Ranks that do not say soon, as this one does, that they have lost another."""
    lost = []
    with contextlib.suppress(RuntimeError):  # the store is lost too
        store.set(f"lost another: {rank}", "")
        for _ in range(10):
            lost = [r for r in range(count) if not store.check([f"lost another: {r}"])]
            if not lost:
                break
            time.sleep(GRACE / 10)
    return lost
