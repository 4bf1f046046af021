"""FSDP2 shards all but the values, whose sparse gradients are averaged as what was read.

torchrun --nproc-per-node 2 examples/sharded_with_sparse_values.py
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import pkm_triton as pkm
import pkm_triton.distributed  # before there is a process group


def main() -> None:
    """Train a small decoder with a memory on sequences that repeat, a share of each on a rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        raise SystemExit(
            "needs torchrun: torchrun --nproc-per-node 2 examples/sharded_with_sparse_values.py"
        )
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    model = pkm.transformer.Transformer(
        vocab_size=32,
        dim=64,
        num_layers=3,
        heads=4,
        context=32,
        memory_layers=[2],
        make_memory=lambda: pkm.ProductKeyMemory(
            64, num_subkeys=64, query_dim=64, sparse_grad=True
        ),
    ).to(device)
    # Every rank has all values: what is small is what a step reads of them.
    mesh = init_device_mesh(device.type, (ranks,))
    pkm.distributed.shard_memory(model, mesh, "replicate")
    for block in model.layers:
        pkm.distributed.fully_shard(block, mesh=mesh)
    pkm.distributed.fully_shard(model, mesh=mesh)
    optimiser = pkm.optim.SparseAdam(pkm.param_groups(model, lr=1e-3, value_lr=1e-2))
    data = torch.randint(0, 32, (256, 4)).repeat(1, 8).to(device)

    losses: list[float] = []
    for step in range(options.steps):
        tokens = data[32 * step % 256 :][:32][rank::ranks]
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # averages gradients of all kinds
        pkm.optim.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    if rank == 0:
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    distributed.barrier()  # no rank leaves while gloo's threads still hold what it sent
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
