"""How good a trained model is: perplexity, bits per byte, recall, usage and KL (paper 4.2)."""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import pkm_triton as pkm

from .data import IGNORED, Data
from .training import mixed_precision

_LARGEST = math.log(sys.float_info.max)
"""The largest loss whose perplexity is a number."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over the test set; see `TrainedRow`."""

    loss: float
    perplexity: float
    bits_per_byte: float
    recall: float
    usage: float
    kl: float
    reads_per_slot: float


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, device: str = "cpu") -> Evaluation:
    """Run a model over the test set, in evaluation mode; its mode is put back."""
    training = model.training
    model.eval()
    loss, targets_seen, bytes_seen = 0.0, 0, 0
    sequences = recalled = tokens = 0
    with pkm.track_usage(model) as usages:
        for inputs, targets in data.test_batches():
            flat = targets.to(device).flatten()
            with mixed_precision(device):
                logits = model(inputs.to(device)).flatten(0, 1)
                total = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
            loss += total.item()
            counts = targets != IGNORED
            right = (logits.argmax(-1) == flat).view_as(targets).cpu() | ~counts
            recalled += int(right.all(-1).sum())
            sequences += len(targets)
            targets_seen += int(counts.sum())
            bytes_seen += data.num_bytes(targets)
            tokens += targets.numel()
    model.train(training)
    mean = loss / targets_seen
    tracked = list(usages.values())
    layers = [model.get_submodule(name) for name in usages]
    per_slot = [
        tokens * layer.heads * layer.top_k / layer.num_slots
        for layer in layers
        if isinstance(layer, pkm.ProductKeyMemory | pkm.FlatKeyMemory)
    ]
    return Evaluation(
        loss=mean,
        perplexity=math.inf if mean > _LARGEST else math.exp(mean),
        bits_per_byte=loss / bytes_seen / math.log(2) if bytes_seen else math.nan,
        recall=math.nan if bytes_seen else recalled / sequences,
        usage=_mean([each.usage().item() for each in tracked]),
        kl=_mean([each.kl().item() for each in tracked]),
        reads_per_slot=_mean(per_slot),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
