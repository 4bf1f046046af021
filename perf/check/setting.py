"""Where checks run, and how large their inputs may be."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """Where checks run.

    Attributes:
        device: of all tensors.
        interpreted: whether kernels are interpreted.
        small: inputs for an interpreter, which takes a second for what a GPU does in microseconds.
        quick: fewer cases.
    """

    device: torch.device
    small: bool
    quick: bool = False
    interpreted: bool = False

    def round(self, plain: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 as the kernels' last conversion rounds it: to the nearest, but that Triton's
        interpreter cuts bfloat16 off."""
        if self.interpreted and dtype == torch.bfloat16 and plain.dtype == torch.float32:
            return (plain.view(torch.int32) & -65536).view(torch.float32).to(dtype)
        return plain.to(dtype)

    def randn(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers that are the same on every machine."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(device=self.device, dtype=dtype)

    def randint(self, limit: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        """int32 below `limit`, the same on every machine."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(limit, shape, generator=generator, dtype=torch.int32)
        return drawn.to(self.device)

    def room_for(self, num_bytes: float) -> bool:
        """Whether the device has so much memory left."""
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return num_bytes < free + reserved - torch.cuda.memory_allocated(self.device)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
