"""A memory over ranks: trained, saved by all of them, loaded in another layout, and by one process.

torchrun --nproc-per-node 2 examples/sharded_memory.py
"""

import argparse
import os

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

import pkm_triton as pkm
import pkm_triton.distributed  # before there is a process group


# --8<-- [start:main]
def make_model() -> nn.Sequential:
    """The model of one process."""
    memory = pkm.ProductKeyMemory(32, num_subkeys=64, query_dim=32, sparse_grad="factored")
    return nn.Sequential(nn.Linear(32, 32), memory)


def spread(layout: str, device: str) -> tuple[nn.Module, pkm.optim.SparseAdam]:
    """The model over all ranks, of which none ever has the whole table, and its optimiser."""
    with torch.device("meta"):
        model = make_model()
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    pkm.distributed.shard_memory(model, mesh, layout).to_empty(device=device)
    for module in model:
        module.reset_parameters()
    parallel = pkm.distributed.data_parallel(model)  # the rest, the same on every rank
    optimiser = pkm.optim.SparseAdam(pkm.param_groups(parallel, lr=1e-2, value_lr=1e-1))
    optimiser.init_state()
    return parallel, optimiser


def train(model: nn.Module, optimiser: pkm.optim.SparseAdam, x: Tensor) -> float:
    """A step on this rank's tokens."""
    loss = (model(x) - x.flip(-1)).square().mean()
    loss.backward()
    pkm.optim.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def run(x: Tensor, steps: int) -> list[float]:
    """Train by columns, save, go on by rows, and write one file."""
    model, optimiser = spread("columns", x.device.type)
    losses = [train(model, optimiser, x) for _ in range(steps // 2)]
    weights, states = get_state_dict(model, optimiser)
    dcp.save({"w": weights, "s": states}, checkpoint_id=pkm.distributed.new_checkpoint("saved"))
    model, optimiser = spread("rows", x.device.type)  # on as many ranks, or on others
    weights, states = get_state_dict(model, optimiser)
    dcp.load({"w": weights, "s": states}, checkpoint_id=pkm.distributed.latest_checkpoint("saved"))
    set_state_dict(model, optimiser, model_state_dict=weights, optim_state_dict=states)
    losses += [train(model, optimiser, x) for _ in range(steps // 2)]
    pkm.save_with_memory(model, "model.pt")  # which one process can load
    return losses
    # --8<-- [end:main]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    if "RANK" not in os.environ:
        raise SystemExit("needs torchrun: torchrun --nproc-per-node 2 examples/sharded_memory.py")
    distributed.init_process_group()
    torch.manual_seed(distributed.get_rank())
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    losses = run(torch.randn(64, 32, device=device), steps)
    if distributed.get_rank() == 0:
        model = pkm.load_with_memory(make_model(), "model.pt")
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}: {model[1]}")
    distributed.barrier()  # no rank leaves while gloo's threads still hold what it sent
    distributed.destroy_process_group()
