"""How unevenly trained memories read their slots, as the sweep's `trained` reads follow it."""

import math

from torch import Tensor, nn

from .data import Data
from .tuning import count_reads


def read_shares(counts: Tensor) -> list[tuple[float, float]]:
    """Of a memory's slots, the most read first: (part of the slots, share of all reads).

    From one slot to all of them, four points for each doubling.

    Args:
        counts: reads of each slot, [K].
    """
    most_first = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    slots = len(counts)
    last = math.ceil(4 * math.log2(slots))
    ends = sorted({min(slots, round(2 ** (step / 4))) for step in range(last + 1)})
    return [(end / slots, most_first[end - 1].item()) for end in ends]


def shares_of(model: nn.Module, data: Data, device: str) -> list[tuple[float, float]] | None:
    """The shares of a model's first memory, or None; all ranks of a sharded model must call."""
    for counted in count_reads(model, data, device).values():
        return read_shares(counted.counts.cpu())
    return None
