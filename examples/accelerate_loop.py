"""A training loop of one's own with accelerate and sparse gradients, on any number of ranks.

accelerate launch examples/accelerate_loop.py
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import pkm_triton as pkm
from pkm_triton.hf.trainers import clip_all_gradients


def main() -> None:
    """Train a small decoder with a memory on sequences that repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    torch.manual_seed(0)
    accelerator = clip_all_gradients(Accelerator())
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
    )
    optimiser = pkm.optim.SparseAdam(pkm.param_groups(model, lr=1e-3, value_lr=1e-2))
    data = torch.randint(0, 32, (256, 4)).repeat(1, 8)
    loader = DataLoader(TensorDataset(data), batch_size=32, shuffle=True)
    model = pkm.distributed.ignore_sparse_values(model)
    model, loader, optimiser = accelerator.prepare(model, loader, optimiser)
    if isinstance(model, DistributedDataParallel):
        pkm.distributed.average_sparse_values(model)

    losses: list[float] = []
    while len(losses) < options.steps:
        for (tokens,) in loader:
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            if len(losses) == options.steps:
                break
    accelerator.print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
