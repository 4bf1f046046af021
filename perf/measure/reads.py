"""Slots to read, drawn from a distribution instead of found by a lookup."""

import torch
from torch import Tensor


def generate_slots(
    distribution: str,
    shape: tuple[int, ...],
    num_slots: int,
    *,
    generator: torch.Generator,
    device: str,
) -> Tensor:
    """Draw slots for the gather, with repetition.

    Args:
        distribution: `uniform`, or `zipf`: the slot of rank r is read with a probability
            proportional to 1 / r, and ranks are dealt to slots at random.
        shape: shape of the result.
        num_slots: K; slots are in [0, K).
        generator: CPU generator that is drawn from.
        device: where the result is put.

    Returns:
        int32 slots of that shape.
    """
    if distribution == "uniform":
        slots = torch.randint(num_slots, shape, generator=generator)
    else:
        ranks = torch.arange(1, num_slots + 1, dtype=torch.float64)
        cumulative = (1 / ranks).cumsum(0)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * cumulative[-1]
        by_rank = torch.randperm(num_slots, generator=generator)
        slots = by_rank[torch.searchsorted(cumulative, drawn).clamp_(max=num_slots - 1)]
    return slots.to(device=device, dtype=torch.int32)
