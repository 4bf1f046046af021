"""Data-parallel training under `torchrun`, or alone."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

import pkm_triton as pkm
from pkm_triton.distributed import average_gradients


class Ranks:
    """The ranks that share every batch.

    Attributes:
        rank: this one, from 0.
        count: how many.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def share(self, model: nn.Module) -> None:
        """Give batch norm the tokens of all ranks; all have drawn the same parameters."""
        if self.count > 1:
            pkm.synchronise_batch_norm(model)

    def average_gradients(self, model: nn.Module) -> None:
        """Make the model's gradients the means over all ranks, sparse ones as what they are."""
        if self.count > 1:
            average_gradients(model.parameters())

    def mean(self, value: float) -> float:
        """The mean over all ranks, on every rank."""
        if self.count == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.item() / self.count

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


@contextmanager
def ranks_of_torchrun(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, as a process group while the block lasts; or one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torch's optimisers import this when first used. Imported while there is a process group it
    # keeps the group's threads alive, which may abort the process while the interpreter ends.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
