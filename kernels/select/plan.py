"""How a lookup selects candidates: the shape it is compiled for, and how its work is dealt out."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..chip import (
    SHARES_MEMORY,
    Chip,
    chip_of,
    float32_precision,
    register_bound,
    takes_float32,
)
from .kernel import select_kernel

# The most maxima of a row, which give a threshold for half as many reads: more take too many
# registers.
MOST_MAXIMA = 256
# Lists of more tokens than run at once, or than fit into so many bytes, are made in turns.
LIST_BYTES = 128 << 20
# Shared bytes that layouts are changed through.
SCRATCH = 8 << 10


class SelectShape(NamedTuple):
    """What the kernel that selects is compiled for.

    rows, tile, block_d: queries of a program, keys scored at a time, and elements of each. dim: of
    a key. warps, stages, registers: of a program, of its loads, of a thread (0: no bound). upcast:
    whether to score in float32. precision: of float32 products. look: tiles looked at first for a
    threshold (0: there is none). read: candidates of a row read at a time.
    """

    rows: int
    tile: int
    dim: int
    block_d: int
    warps: int
    stages: int
    registers: int
    upcast: bool
    precision: str
    look: int
    read: int


@dataclass(frozen=True)
class Plan:
    """A shape, and how the work is dealt out.

    tokens: of a turn. splits, span: programs that share a head's keys, and keys of each. capacity:
    candidates that a list has room for. slots: of a list in memory, some of them for other use.
    """

    shape: SelectShape
    tokens: int
    splits: int
    span: int
    capacity: int
    slots: int

    def turns(self, num_tokens: int) -> range:
        """The first tokens of all turns."""
        return range(0, num_tokens, self.tokens)

    def buffers(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Lists [blocks, H, splits, slots, rows], and how many candidates each holds."""
        tokens, heads = min(self.tokens, query.shape[0]), query.shape[1]
        lists = triton.cdiv(tokens, self.shape.rows) * heads * self.splits
        size = lists * self.slots * self.shape.rows
        return (
            query.new_empty(size, dtype=torch.int64),
            query.new_empty(lists * self.shape.rows, dtype=torch.int32),
        )


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, (n - 1).bit_length())


def choose_select_shape(query: Tensor, keys: Tensor, top_k: int) -> SelectShape:
    """The shape for queries [T, H, D] and keys [H, N, D], by T · H alone of their numbers.

    Tall blocks read the keys seldom: 256 rows, or 128 of wider queries or few tokens; 16 where
    even those would leave most multiprocessors idle.
    """
    num_tokens, heads, dim = query.shape
    chip = chip_of(query.device)
    wide = takes_float32(query, keys)
    top = power_of_two(top_k)
    tile = max(64, 2 * top) if top <= MOST_MAXIMA // 2 else 64
    if 2 * triton.cdiv(num_tokens, 64) * heads < chip.multiprocessors:
        rows, warps = 16, 4
    elif not chip.nvidia or (wide and not chip.async_products):
        rows, warps = 64, 4
    elif tile == 64 and (wide or not chip.warpgroups):
        rows, warps = 128, 8
    elif tile == 64 and 2 * triton.cdiv(num_tokens, 256) * heads >= chip.multiprocessors:
        # Taller blocks read the keys more seldom, if the queries fit into shared memory.
        rows, warps = (256 if choose_block(chip, 256, tile, dim, 2)[0] >= dim else 128), 16
    else:
        # Wider tiles have more maxima, which take more registers.
        rows, warps = (128 if chip.warpgroups and tile < 256 else 64), 8
    block_d, stages = choose_block(chip, rows, tile, dim, 4 if wide else 2)
    return SelectShape(
        rows=rows,
        tile=tile,
        dim=dim,
        block_d=block_d,
        warps=warps,
        stages=stages,
        registers={16: 128, 8: 0, 4: 255}[warps],
        # Products of bfloat16 are wrong in the interpreter.
        upcast=wide or triton.knobs.runtime.interpret,
        precision=float32_precision(query.device),
        look=max(4, 512 // tile) if 2 * top <= tile else 0,
        # Of a thread two columns of each of its rows, or more.
        read=max(16, 128 * warps // rows),
    )


def choose_block(chip: Chip, rows: int, tile: int, dim: int, size: int) -> tuple[int, int]:
    """Elements of a query and a key to score at a time, and stages of their loads.

    The queries stay in shared memory whole where they fit beside a tile of keys; float32 would
    take too many registers.
    """
    whole = max(16, power_of_two(dim))
    # Several programs of few rows run at once.
    shared = chip.shared // 3 if rows == 16 else chip.shared
    ahead = 2 if SHARES_MEMORY and chip.nvidia else 1
    if chip.tensor_memory and tile > 64:
        # Or registers spill.
        ahead = 1
    if size < 4:
        for stages in range(ahead, 0, -1):
            # Products that run beside other instructions keep their operands.
            tiles = stages if chip.async_products else max(1, stages - 1)
            if (rows + tiles * tile) * whole * size + SCRATCH <= shared:
                return whole, stages
    block = min(whole, 32 if size == 4 else 64)
    needed = (rows + tile) * block * size
    if needed > chip.shared:
        raise ValueError(
            f"a program of {chip.architecture} has {chip.shared} bytes of shared memory, but the "
            f"lookup needs {needed}: use_backend('torch')"
        )
    return block, ahead


def plan_selection(query: Tensor, keys: Tensor, top_k: int, spare: int = 0) -> Plan:
    """The plan for queries [T, H, D] and keys [H, N, D]; spare: slots of a list for other use."""
    num_tokens, heads, _ = query.shape
    num_keys = keys.shape[1]
    shape = choose_select_shape(query, keys, top_k)
    at_once = chip_of(query.device).multiprocessors
    splits = 1
    if shape.rows == 16:
        splits = max(1, at_once // (triton.cdiv(num_tokens, 16) * heads))
    span = triton.cdiv(triton.cdiv(num_keys, splits), shape.tile) * shape.tile
    capacity = min(span, 4 * max(shape.tile, power_of_two(top_k)))
    slots = capacity + spare
    splits = triton.cdiv(num_keys, span)
    # As many programs as run at once, or several times as many.
    bytes_at_once = at_once * slots * shape.rows * 8
    programs = at_once * max(1, round(LIST_BYTES / bytes_at_once))
    blocks = max(1, programs // (heads * splits))
    return Plan(shape, blocks * shape.rows, splits, span, capacity, slots)


def select(
    query: Tensor, keys: Tensor, top_k: int, plan: Plan, lists: Tensor, counts: Tensor
) -> None:
    """Write the candidates of queries [T, H, D], all that can be among the top_k of keys [H, N, D].

    Args:
        query: [T, H, D], of one turn of the plan.
        keys: [H, N, D].
        top_k: 1 <= top_k <= N.
        plan: as of `plan_selection`.
        lists, counts: as of `Plan.buffers`.
    """
    num_tokens, heads, _ = query.shape
    shape = plan.shape
    select_kernel[(triton.cdiv(num_tokens, shape.rows) * heads * plan.splits,)](
        query_ptr=query,
        keys_ptr=keys,
        list_ptr=lists,
        count_ptr=counts,
        num_tokens=num_tokens,
        num_keys=keys.shape[1],
        span=plan.span,
        top_k=top_k,
        capacity=plan.capacity,
        slots=plan.slots,
        S=shape,
        num_warps=shape.warps,
        num_stages=1,
        enable_fp_fusion=True,
        **register_bound(query.device, shape.registers),
    )
