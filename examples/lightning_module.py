"""Lightning: two optimisers, one for the values and their sparse gradients.

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


class Decoder(lightning.LightningModule):
    """A small decoder with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # there are two optimisers
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

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Adam for everything but the values, which learn faster."""
        rest, values = pkm.param_groups(self, lr=1e-3, value_lr=1e-2)
        return torch.optim.AdamW([rest]), pkm.optim.SparseAdam([values])

    def training_step(self, batch: list[Tensor], _: int) -> None:
        """One step of both optimisers; only the dense gradients are clipped."""
        (tokens,) = batch
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        rest, values = self.optimizers()
        rest.zero_grad()
        values.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(rest, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        rest.step()
        values.step()
        self.losses.append(loss.item())


def main() -> None:
    """Train on sequences that repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randint(0, 32, (256, 4)).repeat(1, 8))
    trainer = lightning.Trainer(
        max_steps=2 * options.steps,  # Lightning counts the steps of each optimiser
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
