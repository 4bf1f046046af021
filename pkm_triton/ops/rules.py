"""What the rules of forward mode and of torch.func.vmap share."""

import torch
from torch import Tensor

from pkm_triton._checks import MAX_SLOTS


def sum_of_tangents(first: Tensor | None, second: Tensor | None) -> Tensor:
    """The sum of those that there are, one at least."""
    if first is not None and second is not None:
        return first + second
    found = second if first is None else first
    assert found is not None
    return found


def batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """`tensor` with its batch of `size` in front; the same for all where `dim` is None."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def slots_of_tables(slots: Tensor, num_slots: int) -> Tensor:
    """Slots [B, T, R] of tables of K rows as those of the one they make end to end."""
    if slots.shape[0] * num_slots > MAX_SLOTS:
        raise ValueError(
            f"torch.func.vmap makes one of {slots.shape[0]} tables of {num_slots} rows, but at "
            f"most {MAX_SLOTS} are allowed: give it a chunk_size"
        )
    first = torch.arange(slots.shape[0], dtype=slots.dtype, device=slots.device) * num_slots
    inside = (slots >= 0) & (slots < num_slots)
    # What is out of range stays so.
    return torch.where(inside, slots + first[:, None, None], -1)
