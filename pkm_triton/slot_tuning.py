"""Training a few slots of a memory, as sparse memory finetuning does (Lin et al. 2025).

The slots that train are a small parameter of their own, so that nothing can change the others:
neither an optimiser's moments nor weight decay, whatever optimiser it is.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._checks import check_slot_range, check_slots
from .ops.table_functions import gather

if TYPE_CHECKING:
    from .memory import _KeyValueMemory


class TunedSlots(nn.Module):
    """Rows of a table that train, while the table stays as it is.

    Attributes:
        values: parameter [t, d_v], the rows.
        slots: buffer [t], int64, ascending: which rows of the table they stand for.
    """

    slots: Tensor

    def __init__(self, table: Tensor, slots: Tensor) -> None:
        super().__init__()
        slots = slots.detach().flatten().to(device=table.device, dtype=torch.int64).unique()
        self.register_buffer("slots", slots)
        self.values = nn.Parameter(table.detach()[slots].clone())

    def forward(self, table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The gather of slots [..., R] by weights [..., R], of these rows and the others' table."""
        place = torch.searchsorted(self.slots, slots.to(torch.int64))
        place = place.clamp(max=self.slots.shape[0] - 1)
        ours = self.slots[place] == slots
        rows = slots.shape[:-1].numel(), slots.shape[-1]
        wide = torch.promote_types(torch.float32, table.dtype)
        zero = weights.new_zeros(())
        # Read of both tables, each with weights of its own reads alone; summed before rounding.
        fixed = gather(
            table.detach(),
            slots.reshape(rows),
            torch.where(ours, zero, weights).reshape(rows),
            wide,
        )
        tuned = gather(
            self.values, place.reshape(rows), torch.where(ours, weights, zero).reshape(rows), wide
        )
        return (fixed + tuned).to(table.dtype).view(*slots.shape[:-1], table.shape[1])


def train_slots(layer: "_KeyValueMemory", slots: Tensor) -> nn.Parameter:
    """Let these slots of a memory train, and no others; see `rank_slots` for which.

    The memory reads the same as before. Its table stops to require a gradient, and stays bitwise as
    it is whatever is done with the gradients of the rest; freeze what else shall not train yourself
    (`model.requires_grad_(False)` before). The parameter that is returned is small and dense: any
    optimiser will do, and must be made after this call. `merge_slots` ends it, and comes before
    `save_pretrained` or `save_with_memory`.

    Args:
        layer: a `ProductKeyMemory` or `FlatKeyMemory`.
        slots: [t], int32 or int64; a slot may come twice.

    Returns:
        The rows that train, [t', value_dim], those of each slot once, ascending.

    Raises:
        TypeError: if the layer is no such memory, or slots no integer tensor.
        ValueError: if there is no slot, one is out of range, some train already, or the values are
            sharded, or made by a parametrization.
    """
    if getattr(type(layer), "table_names", None) != ("values",):
        raise TypeError(
            f"layer must be a ProductKeyMemory or FlatKeyMemory, not {type(layer).__name__}"
        )
    check_slots(slots)
    if slots.numel() == 0:
        raise ValueError("slots is empty: at least one must train")
    check_slot_range(slots, layer.num_slots)
    if layer.sharding is not None:
        raise ValueError("the layer's values are sharded: train_slots takes whole tables alone")
    if "values" not in layer._parameters:
        raise ValueError("the layer's values are made by a parametrization: remove that first")
    if layer.tuned is not None:
        raise ValueError(f"{len(layer.tuned.slots)} slots train already: merge_slots first")
    layer.tuned = TunedSlots(layer.values, slots)
    layer.values.requires_grad_(False)
    return layer.tuned.values


@torch.no_grad()
def merge_slots(layer: "_KeyValueMemory") -> None:
    """Write the slots that trained into the memory's table, which then trains as a whole again.

    Raises:
        ValueError: if none train.
    """
    tuned = getattr(layer, "tuned", None)
    if tuned is None:
        raise ValueError("no slots of the layer train: train_slots comes first")
    layer.values[tuned.slots] = tuned.values
    layer.values.requires_grad_(True)
    layer.tuned = None
