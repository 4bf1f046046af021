"""The shapes of the product-key lookup's gradients: tile sizes, warps and loads ahead."""

from dataclasses import dataclass, replace

import triton
from torch import Tensor

from ..chip import Chip, chip_of, load_stages

# Shared bytes beside the tiles: layouts are changed through them.
SCRATCH = 8 << 10


@dataclass(frozen=True)
class Blocks:
    """A product of the gradients: tokens, sub-keys and columns at a time, warps, loads ahead.

    swapped: whether the query's product is made transposed.
    """

    tokens: int
    subkeys: int
    columns: int
    warps: int
    stages: int
    swapped: bool = False

    def constants(self, dim: int, num_subkeys: int) -> dict[str, int]:
        """As the kernels' constants and options, not wider than what there is."""
        return {
            "BLOCK_T": self.tokens,
            "BLOCK_N": max(32, min(self.subkeys, triton.next_power_of_2(num_subkeys))),
            "BLOCK_D": max(16, min(self.columns, triton.next_power_of_2(dim))),
            "STAGES": self.stages,
            "num_warps": self.warps,
        }

    def shared(self, chip: Chip, size: int) -> int:
        """The shared bytes of a program, about, with elements of `size` bytes."""
        rows = self.tokens if self.swapped else self.subkeys
        tile = self.tokens * self.subkeys * size
        # Of a loop over sub-keys the tiles are of them, of one over tokens of those.
        loaded = min(self.tokens, self.subkeys) * self.columns * size
        # Without products from shared memory the newest tile is in registers.
        tiles = self.stages if chip.async_products else max(1, self.stages - 1)
        needed = tiles * loaded + tile * (2 if chip.tensor_memory else 1) + SCRATCH
        # There the sums are brought into the order of memory in one piece.
        sums = rows * self.columns * (4 if chip.warpgroups else 2)
        return max(needed, sums) if chip.warpgroups or not chip.nvidia else needed

    def fitted(self, chip: Chip, size: int) -> "Blocks":
        """The same with fewer loads ahead, or else fewer columns, where that is needed to fit.

        Raises:
            ValueError: not even the smallest fits.
        """
        columns = self.columns
        while columns >= 16:
            for stages in range(self.stages, 0, -1):
                blocks = replace(self, columns=columns, stages=stages)
                if blocks.shared(chip, size) <= chip.shared:
                    return blocks
            columns //= 2
        least = replace(self, columns=16, stages=1).shared(chip, size)
        raise ValueError(
            f"a program of {chip.architecture} has {chip.shared} bytes of shared memory, but the "
            f"gradients of the lookup need {least}: use_backend('torch')"
        )


def choose_blocks(query: Tensor, upcast: bool) -> tuple[Blocks, Blocks]:
    """The shapes of the two products of the lookup's gradients: the query's and the sub-keys'.

    Raises:
        ValueError: the chip has too little shared memory for any.
    """
    chip = chip_of(query.device)
    amd = not chip.nvidia
    # Whose tensor cores read operands from shared memory, and have memory of their own for sums.
    tensor_memory = chip.tensor_memory
    shared = chip.async_products
    if upcast:
        of_query = Blocks(128, 32, 128 if shared else 64, 8, 2, shared)
        of_subkeys = Blocks(32, 128, 64, 8, 2)
    else:
        # Where registers hold the sums, so many warps that none spills.
        warps = 8 if tensor_memory or amd else 16
        columns = 128 if amd else 256
        of_query = Blocks(128, 64, columns, warps, 3, shared)
        of_subkeys = Blocks(32, 128, columns, warps, 3)
    if query.shape[0] <= 16:
        of_query = Blocks(16, 64 if upcast else 128, 64, 4, 2, shared)
    stages, size = load_stages(query.device), 4 if upcast else 2
    of_query, of_subkeys = (
        replace(each, stages=min(each.stages, stages)).fitted(chip, size)
        for each in (of_query, of_subkeys)
    )
    return of_query, of_subkeys
