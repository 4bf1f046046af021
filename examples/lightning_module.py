"""Lightning: sparse gradients of the values, clipped with all others, and two learning rates.

python examples/lightning_module.py
"""

import argparse
import logging

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pkm_triton as pkm
from pkm_triton.lightning import MemoryModuleMixin


class Decoder(MemoryModuleMixin, lightning.LightningModule):
    """A small decoder with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.model = pkm.transformer.Transformer(
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
        self.losses: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for everything; on the values it touches the rows that were read."""
        return pkm.optim.SparseAdam(pkm.param_groups(self, lr=1e-3, value_lr=1e-2))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of the next tokens."""
        (tokens,) = batch
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


def main() -> None:
    """Train on sequences that repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randint(0, 32, (256, 4)).repeat(1, 8))
    trainer = lightning.Trainer(
        max_steps=options.steps,
        gradient_clip_val=1.0,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Decoder()
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True))
    print(f"loss {module.losses[0]:.3f} to {module.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
