"""What a point will need, told before it is tried."""

import dataclasses
from collections.abc import Iterable, Sequence

from pkm_triton.perf.measure.timing import PATIENCE
from pkm_triton.perf.records.environment import device_name
from pkm_triton.perf.records.points import COMPILED, Point
from pkm_triton.perf.records.sweep_row import Row, point_of

_FIXED_BYTES = 256 * 2**20
"""Chunk buffers, the warm-up's leftovers and the libraries' own memory."""


def predicted_bytes(point: Point) -> int:
    """Memory the point will need at most, by formula: parameters, gradients and working memory."""
    values = point.num_slots * point.value_dim // point.ranks
    width = point.heads * point.query_dim
    keys = width * (point.num_subkeys if point.keys == "product" else point.num_slots)
    others = keys + point.dim * width
    reads = point.tokens * point.heads * point.top_k
    own, rows_read = point.implementation == "pkm_triton", min(reads, point.num_slots)
    elements = values + others
    if point.backward:
        # Others' sparse gradients have a row a read, and are held twice while they are made
        # coalesced; indices are 8 bytes.
        rows = rows_read if own else 2 * reads
        elements += others + (rows * (point.value_dim + 4) if point.sparse_grad else values)
    if point.steps:
        # What a step makes of the gradient: a few rows for each that was read, or tables; a kernel
        # of ours makes none.
        rows = rows_read if own and point.device == "cuda" else 6 * rows_read
        elements += rows * point.value_dim if point.sparse_grad else 2 * values
    if point.keys == "product" and not own:
        # Scores, their copy for the backward pass, k² candidates with their int64 indices.
        rows = point.tokens * point.heads
        elements += rows * (4 * point.num_subkeys + 4 * point.top_k**2)
    elements += 8 * reads + 8 * point.tokens * (point.dim + width + point.value_dim)
    # Two moments, of 4 bytes even where the table has fewer.
    moments = 2 * (values + others) * max(4, point.itemsize) if point.steps else 0
    return elements * point.itemsize + moments + _FIXED_BYTES


# Seconds that torch.compile takes for a point, in its mode, and on a GPU Triton for all kernels
# of this library, once; bytes a second at which tables are drawn; seconds that a point takes
# besides on a GPU: to be built and warmed up, for a CUDA graph and for the memory.
_COMPILE_SECONDS = {"default": 15.0, "max-autotune-no-cudagraphs": 45.0}
_KERNELS_SECONDS = 60.0
_DRAWN_ON_CPU, _ALSO_ON_GPU = 1e9, 1.0


def predicted_sweep_seconds(points: Sequence[Point], seconds: float) -> tuple[float, float]:
    """About what measuring the points takes at least and at most, compiling included.

    Args:
        points: what will be measured.
        seconds: asked for on each pass, and again on its parts; uneven ones take longer.
    """
    modes = [COMPILED[each.implementation] for each in points if each.implementation in COMPILED]
    fixed = sum(_COMPILE_SECONDS[mode] for mode in modes)
    on_gpu = [point for point in points if point.device == "cuda"]
    fixed += _ALSO_ON_GPU * len(on_gpu)
    if any(point.implementation == "pkm_triton" for point in on_gpu):
        fixed += _KERNELS_SECONDS
    fixed += sum(predicted_bytes(each) for each in points if each.device == "cpu") / _DRAWN_ON_CPU
    timed = 2 * seconds * len(points)
    return timed + fixed, PATIENCE * timed + fixed


def predicted_seconds(point: Point, rows: Iterable[Row]) -> float | None:
    """Time of one pass, from the nearest smaller memory measured on the same device.

    Flat keys and dense gradients take time in proportion to the slots, others to |C| at most.

    Returns:
        Seconds, or None where no smaller memory with otherwise equal parameters has been measured.
    """
    smaller = [
        row
        for row in rows
        if row.ok
        and row.num_subkeys < point.num_subkeys
        and row.device_name == device_name(point.device)
        and dataclasses.replace(point, num_subkeys=row.num_subkeys) == point_of(row)
    ]
    if not smaller:
        return None
    nearest = max(smaller, key=lambda row: row.num_subkeys)
    growth = point.num_subkeys / nearest.num_subkeys
    whole_table = point.keys == "flat" or (point.backward and not point.sparse_grad)
    return nearest.median_ms / 1e3 * (growth**2 if whole_table else growth)
