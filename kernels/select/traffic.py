"""What a lookup moves, by formula."""

import triton
from torch import Tensor

from .plan import Plan


def select_bytes(query: Tensor, keys: Tensor, top_k: int, plan: Plan) -> dict[str, int]:
    """What `select` reads of queries [T, H, D] and keys [H, N, D], from a cache or not.

    The lists depend on the data: "lists" is the least, the best of each written and read once.
    """
    num_tokens, heads, dim = query.shape
    shape = plan.shape
    blocks = triton.cdiv(num_tokens, shape.rows) * heads
    tiles = 0
    for first in range(0, keys.shape[1], plan.span):
        span = min(plan.span, keys.shape[1] - first)
        tiles += triton.cdiv(span, shape.tile)
        whole = span // shape.tile
        if shape.look and whole * shape.tile > 2 * top_k:
            tiles += triton.cdiv(whole, triton.cdiv(whole, shape.look))
    # The queries stay, or are read again for each tile.
    times = plan.splits if dim <= shape.block_d else tiles
    return {
        "query": blocks * times * shape.rows * dim * query.element_size(),
        "keys": blocks * tiles * shape.tile * dim * keys.element_size(),
        "lists": 2 * 8 * num_tokens * heads * top_k,
    }
