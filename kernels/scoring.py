"""Scores of a tile of keys, in thread form: the jit helpers that both lookups share.

Numbers are multiplied as they are, or in two float16 parts (see `float32_products`). What is made
of the queries once and of the keys before is handed on in a tuple for each:

    as they are   query: values, pointers, mask         keys: pointer, first key
    in parts      query: first parts, second, units     keys: pointer to parts, first key, to units

The parts of a query are tuples too, of as many columns as are summed at a time; where they do not
fit into shared memory they stay in memory, and are pointers.
"""

import triton
import triton.language as tl

from .float32_products import (
    add_product_of_parts,
    part_width,
    product_of_parts,
    row_unit,
    slice_width,
    split,
)
from .thread_form import thread_columns, thread_form, thread_rows


@triton.jit
def tile_from(start, end, TILE: tl.constexpr, FIT: tl.constexpr):
    """Where the tile of the keys from start on begins: the last one ends with the last key.

    So no load needs a mask, but for keys fewer than a tile. FIT is 0 for those, 1 for more of
    them, and 2 for as many as fill tiles.
    """
    if FIT == 1:
        return tl.minimum(start, end - TILE)
    else:
        return start


@triton.constexpr_function
def tile_stages(stages, key_dim, block_d):
    """Tiles to have in shared memory at once; where they are read in parts, one, but more parts."""
    return stages if key_dim <= block_d else 1


@triton.jit
def in_tile(
    start, end, ROWS: tl.constexpr, TILE: tl.constexpr, THREADS: tl.constexpr, FIT: tl.constexpr
):
    """Which places of the tile are of the keys start .. end, [C, THREADS]."""
    if FIT == 1:
        return thread_columns(ROWS, TILE, THREADS) >= start - tile_from(start, end, TILE, FIT)
    else:
        return thread_columns(ROWS, TILE, THREADS) < end - start


@triton.jit
def load_query(
    row_ptr, num_rows, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The tuple of the queries at row_ptr [ROWS, 1], as they are; num_rows of them are real."""
    d = tl.arange(0, BLOCK_D)[None, :]
    query_ptr = row_ptr + d
    query_mask = tl.arange(0, ROWS)[:, None] < num_rows
    # What does not fit is read tile by tile instead.
    query_inside = query_mask & (d < KEY_DIM) & (KEY_DIM <= BLOCK_D)
    query = tl.load(query_ptr, mask=query_inside, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    return query, query_ptr, query_mask


@triton.jit
def load_query_in_parts(
    row_ptr, num_rows, spare_ptr, KEY_DIM: tl.constexpr, ROWS: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tuple of the queries at row_ptr [ROWS, 1], in parts.

    The parts go through memory at spare_ptr, for of what is loaded the compiler leaves operands in
    shared memory, and of what is computed in registers: a row's units and 4 bytes for each column.
    """
    SLICE: tl.constexpr = slice_width(BLOCK_D)
    WIDTH: tl.constexpr = (KEY_DIM + BLOCK_D - 1) // BLOCK_D * BLOCK_D
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, SLICE)[None, :]
    query_ptr = row_ptr + d
    most = tl.zeros([ROWS, SLICE], tl.float32)
    for start in tl.range(0, WIDTH, SLICE, num_stages=1):
        mask = (row < num_rows) & (start + d < KEY_DIM)
        query = tl.load(query_ptr + start, mask=mask, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(query))
    unit, scale = row_unit(tl.max(most, 1))
    unit_ptr = spare_ptr.to(tl.pointer_type(tl.float32)) + ROWS * WIDTH
    tl.store(unit_ptr + tl.arange(0, ROWS), unit)
    part_ptr = spare_ptr.to(tl.pointer_type(tl.float16)) + (row * WIDTH + d)
    for start in tl.range(0, WIDTH, SLICE, num_stages=1):
        mask = (row < num_rows) & (start + d < KEY_DIM)
        query = tl.load(query_ptr + start, mask=mask, other=0.0).to(tl.float32)
        first, second = split(query * scale[:, None])
        tl.store(part_ptr + start, first)
        tl.store(part_ptr + (ROWS * WIDTH + start), second)
    tl.debug_barrier()
    if WIDTH <= BLOCK_D:
        firsts = ()
        seconds = ()
        for s in tl.static_range(BLOCK_D // SLICE):
            firsts += (tl.load(part_ptr + s * SLICE),)
            seconds += (tl.load(part_ptr + (ROWS * WIDTH + s * SLICE)),)
    else:
        firsts = part_ptr
        seconds = part_ptr + ROWS * WIDTH
    unit = tl.load(unit_ptr + thread_rows(ROWS, THREADS))
    tl.debug_barrier()
    return firsts, seconds, unit


@triton.jit
def score_whole_tile(
    query, keys, start, end, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`score_tile` of numbers as they are."""
    query, query_ptr, query_mask = query
    keys_ptr, first_key = keys
    start = tile_from(start, end, TILE, FIT)
    # 64 bits for where the tile starts; inside it, 32 are enough and cost half the registers.
    keys_start = (first_key + start) * KEY_DIM
    column = tl.arange(0, TILE)[None, :]
    d = tl.arange(0, BLOCK_D)
    inside = (column < end - start) | (FIT > 0)
    if KEY_DIM <= BLOCK_D:
        offset = column.to(tl.int64) * KEY_DIM
        if FIT > 0 and KEY_DIM == BLOCK_D:
            # With a mask, even of all, registers would first be filled with zeros.
            tile = tl.load((keys_ptr + keys_start) + (offset + d[:, None]))
        else:
            mask = inside & (d[:, None] < KEY_DIM)
            tile = tl.load(keys_ptr + ((keys_start + offset) + d[:, None]), mask=mask, other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        scores = tl.dot(query, tile, input_precision=PRECISION)
    else:
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for first in tl.range(0, KEY_DIM, BLOCK_D, num_stages=STAGES, disable_licm=True):
            keys_mask = inside
            part_mask = query_mask
            if KEY_DIM % BLOCK_D > 0:
                keys_mask &= first + d[:, None] < KEY_DIM
                part_mask &= first + d[None, :] < KEY_DIM
            place = (keys_start + column.to(tl.int64) * KEY_DIM) + (first + d)[:, None]
            tile = tl.load(keys_ptr + place, mask=keys_mask, other=0.0)
            part = tl.load(query_ptr + first, mask=part_mask, other=0.0)
            if UPCAST:
                tile = tile.to(tl.float32)
                part = part.to(tl.float32)
            scores = tl.dot(part, tile, scores, input_precision=PRECISION)
    return thread_form(scores, ROWS, TILE, THREADS)


@triton.jit
def score_tile_in_parts(
    query, keys, start, end, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, FIT: tl.constexpr,
):  # fmt: skip
    """`score_tile` of numbers in two parts."""
    WIDTH: tl.constexpr = part_width(KEY_DIM)
    SLICE: tl.constexpr = slice_width(BLOCK_D)
    firsts, seconds, query_unit = query
    parts_ptr, first_key, units_ptr = keys
    start = tile_from(start, end, TILE, FIT)
    column = tl.arange(0, TILE)[None, :]
    d = tl.arange(0, SLICE)[:, None]
    inside = (column < end - start) | (FIT > 0)
    keys_start = (first_key + start) * (2 * WIDTH)
    place = parts_ptr + ((keys_start + column.to(tl.int64) * (2 * WIDTH)) + d)
    if KEY_DIM <= BLOCK_D:
        for s in tl.static_range(BLOCK_D // SLICE):
            mask = inside & (s * SLICE + d < WIDTH)
            first = tl.load(place + s * SLICE, mask=mask, other=0.0)
            second = tl.load(place + (WIDTH + s * SLICE), mask=mask, other=0.0)
            if s == 0:
                scores = product_of_parts(firsts[s], seconds[s], first, second)
            else:
                scores = add_product_of_parts(scores, firsts[s], seconds[s], first, second)
    else:
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for start_d in tl.range(0, WIDTH, SLICE, num_stages=STAGES, disable_licm=True):
            mask = inside
            if WIDTH % SLICE > 0:
                mask &= start_d + d < WIDTH
            first = tl.load(place + start_d, mask=mask, other=0.0)
            second = tl.load(place + (WIDTH + start_d), mask=mask, other=0.0)
            query_first = tl.load(firsts + start_d)
            query_second = tl.load(seconds + start_d)
            scores = add_product_of_parts(scores, query_first, query_second, first, second)
    own = thread_columns(ROWS, TILE, THREADS)
    mask = (own < end - start) | (FIT > 0)
    unit = tl.load(units_ptr + ((first_key + start) + own), mask=mask, other=0.0)
    # Not infinite, or no product would be zero.
    unit = tl.minimum(query_unit[:, None, :] * unit[None, :, :], 1.7014118346046923e38)
    return thread_form(scores, ROWS, TILE, THREADS) * unit


@triton.jit
def score_tile(
    query, keys, start, end, KEY_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, FIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the tile of keys start .. end (see `tile_from`), in thread form."""
    if PRECISION == "float16x3":
        return score_tile_in_parts(
            query, keys, start, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES, FIT
        )
    else:
        return score_whole_tile(
            query, keys, start, end, KEY_DIM, ROWS, TILE, THREADS, BLOCK_D, STAGES, FIT, UPCAST,
            PRECISION,
        )  # fmt: skip
