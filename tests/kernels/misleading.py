"""Keys of which those seen first mislead: a bound guessed from them is too high."""

import torch
from torch import Tensor

from pkm_triton.kernels.launch import tile_stride

NUM_KEYS, TOP_K = 4000, 16


def gone_through(shape) -> Tensor:
    """The keys in the order in which `selection.go_through` scores them."""
    tiles = -(-NUM_KEYS // shape.tile)
    step = tile_stride(NUM_KEYS, shape.tile) // shape.tile
    order = (tiles // 2 + torch.arange(tiles) * step) % tiles
    keys = order[:, None] * shape.tile + torch.arange(shape.tile)
    return keys.flatten()[keys.flatten() < NUM_KEYS]


def misleading_keys(shape, when: str) -> Tensor:
    """Keys [K] for the query 1, each 2 % below the next better one, so few bits tell them apart.

    when: "first", and 11 of the 16 best are looked at for the first bound; or "raised", and 12 are
    in the list when it is read for a better one, beside others enough to fill the list in the end.
    """
    falling = torch.logspace(20, -18, NUM_KEYS).bfloat16().float()
    if when == "first":
        look = min(shape.tile, 64)
        apart = NUM_KEYS // shape.sample * look
        return falling.roll(apart // (2 * look) * look + look - 11)
    ranks = torch.arange(NUM_KEYS)
    cut = shape.first_cut
    some, best, rest = ranks[40:60], ranks[:12], torch.cat([ranks[12:40], ranks[60:]])
    # The worst of the rest before the cut.
    ranks = torch.cat([some, rest[len(rest) - (cut - 32) :], best, rest[: len(rest) - (cut - 32)]])
    keys = torch.empty(NUM_KEYS)
    keys[gone_through(shape)] = falling[ranks]
    return keys
