"""How much of a memory is used, and how evenly (paper 4.2)."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check_integer, check_same_device, check_slot_range, check_slots, check_tensor
from ._layer_checks import check_device, check_group


@torch.inference_mode(False)
def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device, where it can be changed in inference mode and out of it."""
    return tensor.to(device)


class MemoryUsage:
    """Memory usage and KL divergence from uniform, over all the reads it is shown (paper 4.2).

    With z'_i the sum of the weights given to slot i and z = z' / |z'|_1, the usage is the share of
    slots with z_i not 0, and KL = log K + sum of z_i log z_i.

    The sums z' are kept in float64 on the device of the reads. Nothing waits for that device:
    `usage()` and `kl()` return tensors of one element.

    Args:
        num_slots: K.
        device: where to keep the sums; by default where the first reads are.

    Attributes:
        weight_sums: z', float64 [K].

    Raises:
        TypeError: if num_slots is no integer.
        ValueError: if num_slots is below 1, or there is no such device.
    """

    def __init__(self, num_slots: int, device: torch.device | str | None = None) -> None:
        self.num_slots = check_integer("num_slots", num_slots, 1)
        check_device(device)
        self._device = device
        self.reset()

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget all reads."""
        # Not on the default device, which may be meta while a model is built.
        device = "cpu" if self._device is None else self._device
        self.weight_sums = torch.zeros(self.num_slots, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, slots: Tensor, weights: Tensor) -> None:
        """Add reads: slots [...], int32 or int64, and their weights [...], finite and not negative.

        Raises:
            TypeError: if slots is no integer tensor or weights no floating tensor.
            ValueError: if shapes or devices do not fit, or on the CPU a slot is out of range, or a
                weight negative, infinite or NaN. On a GPU values are not looked at, since that
                would wait for the device.
        """
        check_slots(slots)
        check_tensor("weights", weights, "[..., R]", 1, exact=False)
        if slots.shape != weights.shape:
            raise ValueError(
                f"slots and weights must have the same shape, not {list(slots.shape)} and "
                f"{list(weights.shape)}"
            )
        if self._device is None:
            self._device = slots.device
            self.weight_sums = moved(self.weight_sums, slots.device)
        check_same_device(slots=slots, weights=weights, weight_sums=self.weight_sums)
        check_slot_range(slots, self.num_slots)
        if weights.device.type == "cpu" and weights.numel() > 0:
            low, high = (float(end) for end in weights.aminmax())
            if not (low >= 0 and math.isfinite(high)):  # false for NaN too
                raise ValueError(
                    f"weights must be finite and at least 0, but range from {low} to {high}"
                )
        self.add(slots, weights)

    @torch.no_grad()
    def add(self, slots: Tensor, weights: Tensor) -> None:
        """As `update`, of reads known to be right: nothing is looked at, so it compiles whole."""
        if self.weight_sums.device != slots.device:
            self._device = slots.device
            self.weight_sums = moved(self.weight_sums, slots.device)
        self.weight_sums.index_add_(0, slots.flatten(), weights.flatten().to(torch.float64))

    def merge(self, other: "MemoryUsage") -> None:
        """Add the reads another instance has seen, on any device.

        Raises:
            TypeError: if the other is no MemoryUsage.
            ValueError: if the other counts a memory of another size.
        """
        if not isinstance(other, MemoryUsage):
            raise TypeError(f"other must be a MemoryUsage, not {type(other).__name__}")
        if other.num_slots != self.num_slots:
            raise ValueError(
                f"other has {other.num_slots} slots, but must have {self.num_slots} to be merged"
            )
        self.weight_sums += other.weight_sums.to(self.weight_sums.device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up what all ranks of a process group have seen; all ranks must call it."""
        check_group(group)
        dist.all_reduce(self.weight_sums, group=group)

    def usage(self) -> Tensor:
        """The share of slots that were read with a weight that is not 0; in [0, 1]."""
        return (self.weight_sums != 0).to(torch.float64).mean()

    def kl(self) -> Tensor:
        """KL divergence of the reads from uniform over all slots, in nats; NaN before any read."""
        z = self.weight_sums / self.weight_sums.sum()
        return math.log(self.num_slots) + torch.xlogy(z, z).sum()
