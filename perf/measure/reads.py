"""Slots to read, drawn from a distribution instead of found by a lookup."""

import csv
import functools
import io
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pkm_triton.perf.records.files import write_whole

TRAINED = Path(__file__).with_name("trained_reads.csv")
"""What `pkm-perf train` wrote of the memory that perf/results/STUDIES.md names."""


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
        distribution: `uniform`; `zipf`: the slot of rank r is read with a probability proportional
            to 1 / r; or `trained`: as unevenly as a trained memory was seen to read its slots.
            Ranks are dealt to slots at random.
        shape: shape of the result.
        num_slots: K; slots are in [0, K).
        generator: CPU generator that is drawn from.
        device: where the result is put.

    Returns:
        int32 slots of that shape.
    """
    if distribution == "uniform":
        slots = torch.randint(num_slots, shape, generator=generator)
        return slots.to(device=device, dtype=torch.int32)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    if distribution == "zipf":
        cumulative = (1 / torch.arange(1, num_slots + 1, dtype=torch.float64)).cumsum(0)
        ranks = torch.searchsorted(cumulative, drawn * cumulative[-1])
    else:
        ranks = (_inverse(drawn, *_trained_shares()) * num_slots).long()
    by_rank = torch.randperm(num_slots, generator=generator)
    slots = by_rank[ranks.clamp_(max=num_slots - 1)]
    return slots.to(device=device, dtype=torch.int32)


def _inverse(share: Tensor, parts: Tensor, shares: Tensor) -> Tensor:
    """The part of the slots, most read first, that has such a share of the reads."""
    right = torch.searchsorted(shares, share).clamp_(1, len(shares) - 1)
    low, high = shares[right - 1], shares[right]
    between = torch.where(high > low, (share - low) / (high - low), 0)
    return torch.lerp(parts[right - 1], parts[right], between.clamp_(0, 1))


@functools.cache
def _trained_shares() -> tuple[Tensor, Tensor]:
    return read_shares(TRAINED)


def write_shares(path: Path, shares: Iterable[tuple[float, float]]) -> None:
    """Write (part of the slots, most read first; share of all reads), both rising to 1.

    Raises:
        OSError: the file cannot be written; one that was there is as it was.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slots", "reads"])
    writer.writerows((f"{part:.6g}", f"{share:.6g}") for part, share in shares)
    write_whole(path, text.getvalue())


def read_shares(path: Path) -> tuple[Tensor, Tensor]:
    """What `write_shares` wrote, from (0, 0) on: float64 parts and shares."""
    with path.open(newline="") as file:
        rows = [(float(row["slots"]), float(row["reads"])) for row in csv.DictReader(file)]
    parts, shares = torch.tensor([(0.0, 0.0), *rows], dtype=torch.float64).T
    return parts.contiguous(), shares.contiguous()
