"""A trained model that learns facts more: all of it, by adapters, or by a few slots alone."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import pkm_triton as pkm
from pkm_triton.perf.measure.ranks import Ranks

from .data import Data, FactData
from .training import Trainer
from .trial import Trial

BACKGROUND_BATCH = 16
"""Facts in a batch that slots are counted over: in large batches every slot is read."""


def tune(trained: Trainer, trial: Trial, ranks: Ranks) -> Trainer:
    """Train a trained model on the trial's other facts; returns the trainer, its training done."""
    model, data = trained.model, FactData(trial, tuning=True)
    torch.manual_seed(trial.seed)
    _choose(model, trial, trained.data, data, trained.device)
    second = dataclasses.replace(
        trial,
        steps=trial.tuning_steps,
        warmup=max(1, trial.tuning_steps // 5),
        lr=trial.tuning_lr,
        value_lr=trial.tuning_lr * trial.value_lr / trial.lr,
    )
    trainer = Trainer(second, data, device=trained.device, ranks=ranks, model=model)
    trainer.run()
    return trainer


def _choose(model: nn.Module, trial: Trial, before: Data, task: Data, device: str) -> None:
    """Leave to train what the trial's tuning trains."""
    kind, size = trial.tuned_by
    if kind == "all":
        return
    model.requires_grad_(False)
    if kind == "adapter":
        for module in [each for each in model.modules() if isinstance(each, nn.Linear)]:
            register_parametrization(module, "weight", _LowRank(module.weight, size))
        return
    background, wanted = count_reads(model, before, device), count_reads(model, task, device)
    for layer, counts in wanted.items():
        top = min(size, layer.num_slots)
        pkm.train_slots(layer, pkm.rank_slots(counts, background[layer], top))


class _LowRank(nn.Module):
    """A weight [out, in] plus a product of rank R, at first zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns).to(weight) * columns**-0.5)
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@torch.no_grad()
def count_reads(
    model: nn.Module, data: Data, device: str
) -> dict[pkm.ProductKeyMemory | pkm.FlatKeyMemory, pkm.SlotCounts]:
    """What each memory of a model reads of the test set, in batches of 16 sequences."""
    counts = {
        layer: pkm.SlotCounts(layer.num_slots)
        for layer in model.modules()
        if isinstance(layer, pkm.ProductKeyMemory | pkm.FlatKeyMemory)
    }

    def count(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(layer, pkm.ProductKeyMemory | pkm.FlatKeyMemory)
        counts[layer].update(layer.lookup(*arguments)[1])

    hooks = [layer.register_forward_pre_hook(count) for layer in counts]
    training = model.training
    model.eval()
    for inputs, _ in data.test_batches():
        for few in inputs.split(BACKGROUND_BATCH):
            model(few.to(device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return counts
