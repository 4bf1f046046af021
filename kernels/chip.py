"""The chip that a launch is for, and what the shapes of kernels depend on."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# Triton 3.6 gives every loop that loads ahead memory of its own, which some kernels lack.
SHARES_MEMORY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@dataclass(frozen=True)
class Chip:
    """An architecture, its multiprocessors, and the shared bytes that a program may have.

    architecture: as compilers name it, "sm_90" or "gfx942".
    """

    architecture: str
    multiprocessors: int
    shared: int

    @property
    def nvidia(self) -> bool:
        """Whether it is NVIDIA's."""
        return self.architecture.startswith("sm_")

    @property
    def warpgroups(self) -> bool:
        """Whether four warps multiply together, as on Hopper: operands in shared memory."""
        return self.architecture == "sm_90"

    @property
    def tensor_memory(self) -> bool:
        """Whether products are summed in a memory of their own, as on data centres' Blackwell."""
        return self.architecture.startswith("sm_10")

    @property
    def async_products(self) -> bool:
        """Whether products run beside other instructions, from operands in shared memory."""
        return self.warpgroups or self.tensor_memory


# Of each architecture a chip with as many multiprocessors as the usual one has (CUDA C++
# Programming Guide, technical specifications by compute capability; AMD's CDNA and RDNA guides).
CHIPS = {
    chip.architecture: chip
    for chip in (
        Chip("sm_80", 108, 163 << 10),
        Chip("sm_86", 84, 99 << 10),
        Chip("sm_89", 128, 99 << 10),
        Chip("sm_90", 132, 227 << 10),
        Chip("sm_100", 148, 227 << 10),
        Chip("sm_120", 170, 99 << 10),
        Chip("gfx942", 304, 64 << 10),
        Chip("gfx950", 256, 160 << 10),
        Chip("gfx1100", 96, 64 << 10),
        Chip("gfx1201", 64, 64 << 10),
    )
}
# What the interpreter takes shapes for: few programs, for they run one after another.
INTERPRETER = Chip("sm_90", 16, 227 << 10)

_assumed: Chip | None = None


@contextmanager
def as_if(chip: Chip) -> Iterator[None]:
    """Have shapes chosen for another chip: for reports, tests and tools."""
    global _assumed
    previous, _assumed = _assumed, chip
    try:
        yield
    finally:
        _assumed = previous


def chip_of(device: torch.device) -> Chip:
    """The chip of a device."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return INTERPRETER
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    # Of AMD's torch does not say, or says 0; all have 64 KiB or more.
    known = CHIPS[architecture].shared if architecture in CHIPS else 64 << 10
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or known
    return Chip(architecture, properties.multi_processor_count, shared)


def takes_float32(query: Tensor, keys: Tensor) -> bool:
    """Whether scores take float32: those of float32, or of mixed dtypes."""
    return query.dtype != keys.dtype or query.dtype == torch.float32


def float32_precision(device: torch.device) -> str:
    """How to multiply float32: as exactly as tensor cores can, three products for one."""
    return "tf32x3" if chip_of(device).nvidia else "ieee"


def register_bound(device: torch.device, registers: int) -> dict[str, int]:
    """The option that bounds a thread's registers; 0: none. AMD's compiler takes no such option."""
    return {"maxnreg": registers} if registers and chip_of(device).nvidia else {}


def load_stages(device: torch.device) -> int:
    """Tiles to have in shared memory at once: the more, the more loads run ahead."""
    return 3 if chip_of(device).shared > 64 << 10 else 1
