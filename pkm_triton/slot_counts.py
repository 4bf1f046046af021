"""Which slots a corpus reads, and which a task reads more than others (Lin et al. 2025)."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import check_integer, check_same_device, check_slot_range, check_slots
from ._layer_checks import check_device, check_group
from .usage import moved


class SlotCounts:
    """How often each slot was read, and in how many batches, of the batches it is shown.

    What sparse memory finetuning ranks slots by (see `rank_slots`): counts of a task, and batch
    frequencies of a background corpus. Kept in int64 on the device of the reads; nothing waits for
    that device, and a batch costs O(its reads).

    Args:
        num_slots: K.
        device: where to keep the counts; by default where the first reads are.

    Attributes:
        counts: reads of each slot, int64 [K].
        batches_with: batches that read each slot, int64 [K].
        num_batches: batches seen.

    Raises:
        TypeError: if num_slots is no integer.
        ValueError: if num_slots is below 1, or there is no such device.
    """

    def __init__(self, num_slots: int, device: torch.device | str | None = None) -> None:
        self.num_slots = check_integer("num_slots", num_slots, 1)
        check_device(device)
        self._device = None if device is None else torch.device(device)
        self.reset()

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget all reads."""
        # Not on the default device, which may be meta while a model is built.
        device = self._device or torch.device("cpu")
        self.counts = torch.zeros(self.num_slots, dtype=torch.int64, device=device)
        self.batches_with = torch.zeros_like(self.counts)
        # The number of the last batch that read a slot: a slot is counted once a batch.
        self._last = torch.zeros_like(self.counts)
        self.num_batches = 0

    @torch.no_grad()
    def update(self, slots: Tensor) -> None:
        """Add a batch's reads: slots [...], int32 or int64, as `lookup` of a layer returns them.

        Raises:
            TypeError: if slots is no integer tensor.
            ValueError: if its device does not fit, or on the CPU a slot is out of range. On a GPU,
                where the range is not checked, such a slot is passed over.
        """
        check_slots(slots)
        if self._device is None:
            self._device = slots.device
            self.counts, self.batches_with, self._last = (
                moved(each, slots.device) for each in (self.counts, self.batches_with, self._last)
            )
        check_same_device(slots=slots, counts=self.counts)
        check_slot_range(slots, self.num_slots)
        flat = slots.flatten().to(torch.int64)
        inside = (flat >= 0) & (flat < self.num_slots)
        flat = flat.clamp(0, self.num_slots - 1)
        self.num_batches += 1
        self.counts.index_add_(0, flat, inside.to(torch.int64))
        # Of the reads of a slot that is new to this batch each adds one, and one stays.
        seen = inside & (self._last[flat] < self.num_batches)
        number = torch.where(seen, self.num_batches, 0)
        new = self.batches_with[flat] + seen
        self.batches_with.scatter_reduce_(0, flat, new, "amax")
        self._last.scatter_reduce_(0, flat, number, "amax")

    def merge(self, other: "SlotCounts") -> None:
        """Add the batches another instance has seen, on any device.

        Raises:
            TypeError: if the other is no SlotCounts.
            ValueError: if the other counts a memory of another size.
        """
        if not isinstance(other, SlotCounts):
            raise TypeError(f"other must be a SlotCounts, not {type(other).__name__}")
        if other.num_slots != self.num_slots:
            raise ValueError(
                f"other has {other.num_slots} slots, but must have {self.num_slots} to be merged"
            )
        self.counts += other.counts.to(self.counts.device)
        self.batches_with += other.batches_with.to(self.counts.device)
        self.num_batches += other.num_batches

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up what all ranks of a process group have seen, each its own batches."""
        check_group(group)
        number = torch.tensor([self.num_batches], device=self.counts.device)
        for tensor in (self.counts, self.batches_with, number):
            dist.all_reduce(tensor, group=group)
        self.num_batches = int(number)

    def state_dict(self) -> dict[str, Tensor]:
        """What has been counted, as tensors."""
        return {
            "counts": self.counts.clone(),
            "batches_with": self.batches_with.clone(),
            "num_batches": torch.tensor(self.num_batches),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, on this instance's device.

        Raises:
            TypeError: if the state is no mapping of integer tensors.
            ValueError: if something is missing (all of it is named), or of another size.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a state dict, not {type(state).__name__}")
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"state has no {', '.join(missing)}")
        for name in ("counts", "batches_with"):
            check_slots(state[name], f"state[{name!r}]", "[K]")
            if state[name].shape != (self.num_slots,):
                raise ValueError(
                    f"state[{name!r}] has shape {list(state[name].shape)}, but must have "
                    f"[{self.num_slots}]"
                )
        self.reset()
        self.counts.copy_(state["counts"])
        self.batches_with.copy_(state["batches_with"])
        self.num_batches = int(state["num_batches"])


def rank_slots(task: SlotCounts, background: SlotCounts, top: int) -> Tensor:
    """The slots that a task reads more than a background corpus does, best first, by tf-idf.

    The score of slot i is c(i) / sum of c · log((B + 1) / (df(i) + 1)), with c the task's counts,
    and df(i) of the background's B batches that read the slot (Lin et al. 2025, "Continual
    Learning via Sparse Memory Finetuning").

    Args:
        task: counts of the task's reads.
        background: counts of the reads of what is to be kept.
        top: t, how many slots; at most K.

    Returns:
        [t'], int64, on the task's device: `top` slots, or as many as the task reads. Of equal
        scores the lower slot comes first.

    Raises:
        TypeError: if top is no integer, or an argument no `SlotCounts`.
        ValueError: if top is out of range, or the two count memories of other sizes.
    """
    for name, counts in (("task", task), ("background", background)):
        if not isinstance(counts, SlotCounts):
            raise TypeError(f"{name} must be a SlotCounts, not {type(counts).__name__}")
    if task.num_slots != background.num_slots:
        raise ValueError(
            f"task counts {task.num_slots} slots, but background {background.num_slots}"
        )
    top = check_integer("top", top, 1)
    if top > task.num_slots:
        raise ValueError(f"top is {top}, but there are only {task.num_slots} slots")
    counts = task.counts.to(torch.float64)
    frequency = background.batches_with.to(counts)
    scores = counts / counts.sum() * torch.log((background.num_batches + 1) / (frequency + 1))
    # What the task does not read comes after all else, whatever the background reads.
    scores = scores.where(task.counts > 0, -1)
    order = scores.sort(descending=True, stable=True).indices
    return order[: min(top, int((task.counts > 0).sum()))]
