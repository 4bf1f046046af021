"""The shapes of the product-key lookup's gradients: tile sizes, warps and loads ahead."""

from dataclasses import dataclass

import triton
from torch import Tensor

from ..chip import chip_of


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

    def constants(self, dim: int, num_subkeys: int, stages: int) -> dict[str, int]:
        """As the kernels' constants and options, not wider than what there is."""
        return {
            "BLOCK_T": self.tokens,
            "BLOCK_N": max(32, min(self.subkeys, triton.next_power_of_2(num_subkeys))),
            "BLOCK_D": max(16, min(self.columns, triton.next_power_of_2(dim))),
            "STAGES": min(self.stages, stages),
            "num_warps": self.warps,
        }


def choose_blocks(query: Tensor, upcast: bool) -> tuple[Blocks, Blocks]:
    """The shapes of the two products of the lookup's gradients: the query's and the sub-keys'."""
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
    return of_query, of_subkeys
