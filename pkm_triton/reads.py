"""What gathers read of a table, and the gradient of what they gave: the factors of its gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._backend import implementation
from ._checks import int32_slots

# Of the rows that a norm makes, so many elements are there at a time, about.
NORM_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Reads:
    """What one gather read of a table, and the gradient of its output.

    Attributes:
        slots: [T, R], int32.
        weights: [T, R].
        grad_output: [T, d_v].
    """

    slots: Tensor
    weights: Tensor
    grad_output: Tensor

    def scaled(self, factor: float | Tensor) -> "Reads":
        """The same reads, of a gradient that is `factor` times this one's."""
        if isinstance(factor, Tensor):
            factor = factor.to(self.grad_output.device)
        return Reads(self.slots, self.weights, self.grad_output * factor)

    @classmethod
    def copied(cls, slots: Tensor, weights: Tensor, grad_output: Tensor, num_slots: int) -> "Reads":
        """Copies, for their owner may use the buffers again; slots in [0, num_slots)."""
        return cls(*(_copy(x) for x in (int32_slots(slots, num_slots), weights, grad_output)))

    def rows(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """The rows of a table that were read, [M] int64 and ascending, and their gradient."""
        # Of the table only the shape is asked for.
        table = self.grad_output.new_empty(1, 1).expand(num_slots, self.grad_output.shape[1])
        if self.slots.numel() == 0:
            return self.slots.new_empty(0, dtype=torch.int64), table[:0]
        functions = implementation(table, self.weights)
        rows, grad_rows, _ = functions.gather_values_backward_sparse(
            self.grad_output, table, self.slots, self.weights, False
        )
        return rows, grad_rows

    def norm(self, num_slots: int, norm_type: float, dtype: torch.dtype) -> Tensor:
        """The p-norm, p > 0, of the table's gradient; its rows are made a few columns at a time."""
        columns = max(1, NORM_ELEMENTS // max(1, min(self.slots.numel(), num_slots)))
        norms = [self.grad_output.new_zeros((), dtype=dtype)]
        for some in self.grad_output.to(dtype).split(columns, dim=1):
            _, grad_rows = Reads(self.slots, self.weights, some.contiguous()).rows(num_slots)
            norms.append(torch.linalg.vector_norm(grad_rows, norm_type))
        return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def joined(parts: list[Reads]) -> Reads:
    """All reads as those of one gather, one after another."""
    if len(parts) == 1:
        return parts[0]
    reads = max(part.slots.shape[1] for part in parts)

    def padded(x: Tensor, filling: Tensor) -> Tensor:
        missing = reads - x.shape[1]
        return torch.cat([x, filling.expand(-1, missing)], 1) if missing else x

    # Short tokens read their last row again, with a weight of zero.
    return Reads(
        torch.cat([padded(p.slots, p.slots[:, -1:]) for p in parts]),
        torch.cat([padded(p.weights, torch.zeros_like(p.weights[:, -1:])) for p in parts]),
        torch.cat([p.grad_output for p in parts]),
    )


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)
