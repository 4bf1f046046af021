"""Scores of a tile of keys."""

import triton
import triton.language as tl

from .layout import to_fragments


@triton.jit
def load_query(query_ptr, row, S: tl.constexpr):
    """The queries of the rows [ROWS, 1], or the rows again where a tile reads them in parts."""
    DIM: tl.constexpr = S.dim
    BLOCK_D: tl.constexpr = S.block_d
    UPCAST: tl.constexpr = S.upcast
    d = tl.arange(0, BLOCK_D)[None, :]
    if DIM > BLOCK_D:
        query = row
    elif DIM == BLOCK_D:
        query = tl.load(query_ptr + row * DIM + d)
    else:
        query = tl.load(query_ptr + row * DIM + d, mask=d < DIM, other=0.0)
    if UPCAST and DIM <= BLOCK_D:
        query = query.to(tl.float32)
    return query


@triton.jit
def score_tile(query, query_ptr, keys_ptr, start, end, S: tl.constexpr):
    """Scores of the keys from start on in fragments; past the end, of those a tile before."""
    ROWS: tl.constexpr = S.rows
    DIM: tl.constexpr = S.dim
    BLOCK_D: tl.constexpr = S.block_d
    UPCAST: tl.constexpr = S.upcast
    STAGES: tl.constexpr = S.stages
    PRECISION: tl.constexpr = S.precision
    THREADS: tl.constexpr = 32 * S.warps
    TILE: tl.constexpr = S.tile
    # No mask, which would take a register for each address; 64 bits for the tile's alone.
    column = tl.arange(0, TILE)
    column = tl.maximum(tl.where(column < end - start, column, column - TILE), -start)
    tile_ptr = keys_ptr + tl.cast(start, tl.int64) * DIM
    d = tl.arange(0, BLOCK_D)[:, None]
    place = column[None, :] * DIM + d
    if DIM <= BLOCK_D:
        if DIM < BLOCK_D:
            keys = tl.load(tile_ptr + place, mask=d < DIM, other=0.0)
        else:
            keys = tl.load(tile_ptr + place)
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, keys, input_precision=PRECISION)
    else:
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for first in tl.range(0, DIM, BLOCK_D, num_stages=STAGES, disable_licm=True):
            inside = first + d < DIM
            part = tl.load(
                query_ptr + query * DIM + first + tl.arange(0, BLOCK_D)[None, :],
                mask=first + tl.arange(0, BLOCK_D)[None, :] < DIM,
                other=0.0,
            )
            keys = tl.load(tile_ptr + place + first, mask=inside, other=0.0)
            if UPCAST:
                part = part.to(tl.float32)
                keys = keys.to(tl.float32)
            scores = tl.dot(part, keys, scores, input_precision=PRECISION)
    return to_fragments(scores, THREADS)
