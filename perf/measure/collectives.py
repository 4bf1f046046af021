"""What this rank really sends to others and receives, counted where collectives are called."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from pkm_triton.distributed.collective_bytes import all_reduce_bytes


@dataclass(frozen=True)
class Counted:
    """A collective that was called, as `pkm_triton.distributed.Collective` has it of all ranks."""

    collective: str
    sent: int
    received: int


class CollectiveBytes(TorchDispatchMode):
    """Counts the bytes of every collective called while it is active.

    Functional ones and those of `torch.distributed`, by the sizes of the tensors they are given.

    Attributes:
        counted: the collectives, in order.

    Raises:
        NotImplementedError: for a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Counted] = []

    @property
    def sent(self) -> int:
        """Bytes sent to other ranks so far."""
        return sum(each.sent for each in self.counted)

    @property
    def received(self) -> int:
        """Bytes received from other ranks so far."""
        return sum(each.received for each in self.counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call, and make it."""
        if func.namespace in ("_c10d_functional", "c10d"):
            name = func.overloadpacket.__name__
            if name not in ("wait_tensor", "barrier"):
                self.counted.append(_count(name, args))
        return func(*args, **(kwargs or {}))


def _count(name: str, args: Any) -> Counted:
    if name == "all_gather_into_tensor":
        x, ranks, _ = args
        return _even("all_gather", x.nbytes * (ranks - 1))
    if name == "allgather_":
        (received,), (x,) = args[:2]
        return _even("all_gather", x.nbytes * (len(received) - 1))
    if name == "all_to_all_single":
        x, receive, send, group_name = args
        mine = _resolve_process_group(group_name).rank()
        size = x.itemsize * x[:1].numel() if x.ndim > 1 else x.itemsize
        others = [sum(split) - split[mine] for split in (send, receive)]
        return Counted("all_to_all", others[0] * size, others[1] * size)
    if name in ("allreduce_", "all_reduce"):
        tensors: list[Tensor] = args[0] if name == "allreduce_" else [args[0]]
        group = (
            ProcessGroup.unbox(args[1]) if name == "allreduce_" else _resolve_process_group(args[2])
        )
        size = sum(x.nbytes for x in tensors)
        return _even("all_reduce", all_reduce_bytes(size, group.size()))
    raise NotImplementedError(f"the bytes of {name} are not known")


def _even(name: str, size: int) -> Counted:
    return Counted(name, size, size)
