"""What the lookups move, by formula: the traffic of their loads and stores, from a cache or not.

Of the query, the keys and the result it is known beforehand. That of the lists of candidates
depends on the scores, so a bound is all there is.
"""

from itertools import pairwise

import triton

from .float32_products import part_width
from .launch import Lists, Splits


def split_bytes(
    shape: Splits, num_tokens: int, heads: int, num_keys: int, key_dim: int, sizes: tuple[int, int]
) -> dict[str, int]:
    """What `split_topk` and the merge after it move but for the result.

    Args:
        shape: how the lookup runs.
        num_tokens, heads, num_keys, key_dim: T, H, K and D of queries [T, H, D], keys [H, K, D].
        sizes: bytes of an element of the query, and of the keys.
    """
    ends = [split * num_keys // shape.splits for split in range(shape.splits + 1)]
    tiles = sum(triton.cdiv(end - start, shape.tile) for start, end in pairwise(ends))
    blocks = triton.cdiv(num_tokens, shape.rows)
    return {
        # Read again for every tile of keys.
        "query": tiles * num_tokens * heads * key_dim * sizes[0],
        "keys": blocks * heads * num_keys * key_dim * sizes[1],
        # Written, and read by the merge.
        "part": 2 * num_tokens * heads * shape.splits * shape.top * 8,
    }


def select_bytes(
    shape: Lists, num_tokens: int, heads: int, num_keys: int, key_dim: int, sizes: tuple[int, int]
) -> dict[str, int]:
    """What `selection.select` moves of the query and the keys; the arguments as `split_bytes`'s.

    Where it speculates, what it moves if it need not go through the keys again.

    Of keys in parts it is what is read of the parts, and of the units.
    """
    # Looked at first, for a bound, and then all.
    looked_at = min(num_keys, shape.sample) if shape.sets else 0
    look = min(shape.tile, 64)
    looks, tiles = triton.cdiv(looked_at, look), triton.cdiv(num_keys, shape.tile)
    # The last tile is whole, unless there are fewer keys.
    scored = looks * look + tiles * shape.tile if shape.fit else looked_at + num_keys
    blocks = triton.cdiv(num_tokens, shape.rows)
    if shape.in_parts:
        return {
            # For the largest of its rows, and again.
            "query": 2 * num_tokens * heads * key_dim * sizes[0],
            "keys": blocks * heads * scored * part_width(key_dim) * 4,
            # Once for each pair of rows.
            "units": blocks * heads * scored * shape.rows // 2 * 4,
        }
    return {
        # Kept if it fits, else read again for every tile.
        "query": (looks + tiles if key_dim > shape.block_d else 1)
        * num_tokens * heads * key_dim * sizes[0],
        "keys": blocks * heads * scored * key_dim * sizes[1],
    }  # fmt: skip


def sort_bytes_at_most(length: int, log_top: int) -> int:
    """The most that storing a list's head and sorting `length` entries move."""
    # Tried twice by halves of entries, then done by all of them; the best are read, each once more
    # or not, and written.
    return 16 * length + 24 * 2**log_top + 64


def list_bytes_at_most(shape: Lists, num_keys: int, top_k: int) -> int:
    """The most that `selection.select` moves of one row's list, whatever the scores."""
    length = 2**shape.log_list
    parts = 0
    if shape.in_parts:
        # Of the query, written and read, once or for each tile; and its unit.
        tiles = triton.cdiv(shape.sample, shape.tile) + triton.cdiv(num_keys, shape.tile)
        parts = 8 * shape.spare * (1 + tiles) if shape.spare else 8 * shape.block_d
        parts += 4 + 8 * 32 * shape.warps // shape.rows
    # At most once each time so many keys were seen that a list may be full ...
    sorts = 1 + num_keys // (length - shape.tile - top_k)
    # ... and at the cuts, where it does not look at no more than 128 entries instead.
    looks = 0
    cut = shape.first_cut
    while cut < num_keys:
        looks += shape.speculate
        sorts += not shape.speculate
        cut = cut * shape.growth // (2 * shape.tile) * shape.tile
    # Each key is appended at most once; a bound is read from four places.
    once = 8 * num_keys + sorts * (sort_bytes_at_most(length, shape.log_top) + 32) + looks * 512
    return (parts + once) * (2 if shape.speculate else 1)
