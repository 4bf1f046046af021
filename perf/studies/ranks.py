"""Data-parallel training under `torchrun`, or alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pkm_triton as pkm


class Ranks:
    """The ranks that share every batch.

    Attributes:
        rank: this one, from 0.
        count: how many.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._sparse: list[nn.Parameter] = []

    def share(self, model: nn.Module) -> nn.Module:
        """What to call in the place of `model` so that gradients are the means over all ranks.

        But for sparse gradients of memory values: `mean_sparse_gradients` after each backward pass.
        """
        if self.count == 1:
            return model
        pkm.synchronise_batch_norm(model)
        # DDP takes what requires a gradient, and knows the sparse ones of torch's embeddings only.
        self._sparse = [
            module.values
            for module in model.modules()
            if isinstance(module, pkm.ProductKeyMemory | pkm.FlatKeyMemory) and module.sparse_grad
        ]
        for values in self._sparse:
            values.requires_grad_(False)
        shared = nn.parallel.DistributedDataParallel(model)
        for values in self._sparse:
            values.requires_grad_(True)
        return shared

    def mean_sparse_gradients(self) -> None:
        """Make the sparse gradients of the shared model the means over all ranks."""
        for values in self._sparse:
            assert values.grad is not None
            grad = values.grad.coalesce()
            rows = _gather_rows(grad.indices()[0], self.count)
            grad_rows = _gather_rows(grad.values() / self.count, self.count)
            values.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), grad_rows, values.shape, check_invariants=False
            ).coalesce()

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


def _gather_rows(rows: Tensor, ranks: int) -> Tensor:
    """The rows of all ranks, of which each may have another number, one after the other."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


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
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
