"""What a point will need, told before it is tried."""

import dataclasses
from collections.abc import Iterable

from pkm_triton.perf.records.points import Point
from pkm_triton.perf.records.sweep_row import Row, point_of

_FIXED_BYTES = 256 * 2**20
"""Chunk buffers, the warm-up's leftovers and the libraries' own memory."""


def predicted_bytes(point: Point) -> int:
    """Memory the point will need at most, by formula: parameters, gradients and working memory."""
    values = point.num_slots * point.value_dim
    width = point.heads * point.query_dim
    keys = width * (point.num_subkeys if point.keys == "product" else point.num_slots)
    others = keys + point.dim * width
    reads = point.tokens * point.heads * point.top_k
    elements = values + others
    if point.backward:
        # A sparse gradient is held twice while it is made coalesced; indices are 8 bytes.
        elements += others + (2 * reads * (point.value_dim + 4) if point.sparse_grad else values)
    if point.steps:
        # What a step makes of the gradient: a few rows a read, or tables.
        elements += 6 * reads * point.value_dim if point.sparse_grad else 2 * values
    if point.keys == "product" and point.implementation != "pkm_triton":
        # Scores, their copy for the backward pass, k² candidates with their int64 indices.
        rows = point.tokens * point.heads
        elements += rows * (4 * point.num_subkeys + 4 * point.top_k**2)
    elements += 8 * reads + 8 * point.tokens * (point.dim + width + point.value_dim)
    # Two moments, of 4 bytes even where the table has fewer.
    moments = 2 * (values + others) * max(4, point.itemsize) if point.steps else 0
    return elements * point.itemsize + moments + _FIXED_BYTES


def predicted_seconds(point: Point, rows: Iterable[Row]) -> float | None:
    """Time of one pass, from the nearest smaller memory measured on the same device.

    Flat keys take time in proportion to the slots, product keys to |C| at most.

    Returns:
        Seconds, or None where no smaller memory with otherwise equal parameters has been measured.
    """
    smaller = [
        row
        for row in rows
        if row.ok
        and row.num_subkeys < point.num_subkeys
        and dataclasses.replace(point, num_subkeys=row.num_subkeys) == point_of(row)
    ]
    if not smaller:
        return None
    nearest = max(smaller, key=lambda row: row.num_subkeys)
    growth = point.num_subkeys / nearest.num_subkeys
    return nearest.median_ms / 1e3 * (growth**2 if point.keys == "flat" else growth)
