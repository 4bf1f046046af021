"""Compulsory memory traffic of a pass, by formula, and the device's bandwidth.

Each tensor is counted once where it must be read and once where it must be written; what an
implementation keeps between its own steps is not counted. A value is counted once however often
it is read, so `distinct` is the number of different slots read in the pass.

    T tokens, H heads, d_q query width, N sub-keys, K slots, k reads a head, R = H·k reads a token,
    d_v value width, s bytes an element. Scores are 4 bytes, slots are 4 bytes.
"""

import functools
import math
import time
from collections.abc import Callable

import torch

from pkm_triton.perf.records.points import Point

SCORE_BYTES = 4
SLOT_BYTES = 4


def query_bytes(point: Point) -> int:
    """The projection: x [T, dim], weight [dim, H·d_q] in; queries [T, H·d_q] out."""
    width = point.heads * point.query_dim
    forward = point.tokens * point.dim + point.dim * width + point.tokens * width
    # Backward reads x, the weight and the query's gradient; writes two gradients.
    backward = 2 * point.tokens * point.dim + 2 * point.dim * width + point.tokens * width
    return point.itemsize * (forward + backward * point.backward)


def lookup_bytes(point: Point) -> int:
    """The search: queries and keys in; scores and slots [T, R] out.

    The kernels' formulas (`product_key_topk_bytes`, `flat_key_topk_bytes`) count as well what is
    read again, from a cache if one holds it.
    """
    queries = point.tokens * point.heads * point.query_dim
    if point.keys == "product":
        keys = point.heads * point.num_subkeys * point.query_dim
    else:
        keys = point.heads * point.num_slots * point.query_dim
    reads = point.tokens * point.heads * point.top_k
    forward = point.itemsize * (queries + keys) + (SCORE_BYTES + SLOT_BYTES) * reads
    # Backward reads the same and the scores' gradient; writes the gradients of queries and keys.
    backward = point.itemsize * 2 * (queries + keys) + (SCORE_BYTES + SLOT_BYTES) * reads
    return forward + backward * point.backward


def gather_bytes(point: Point, distinct: int) -> int:
    """The weighted sum: slots, weights [T, R] and `distinct` values in; outputs [T, d_v] out."""
    reads = point.tokens * point.heads * point.top_k
    output = point.tokens * point.value_dim
    rows = distinct * point.value_dim
    forward = (SLOT_BYTES + point.itemsize) * reads + point.itemsize * (rows + output)
    # Backward reads slots, weights, values and the output's gradient; writes the gradients of
    # the weights and of the values: the rows that were read, or all K of them, or their factors,
    # which are there already.
    written = rows if point.sparse_grad else point.num_slots * point.value_dim
    if point.pass_name == "fused-step":
        written = 0
    backward = (SLOT_BYTES + 2 * point.itemsize) * reads + point.itemsize * (
        rows + output + written
    )
    return forward + backward * point.backward


def step_bytes(point: Point, distinct: int) -> int:
    """Adam: gradient in; parameter and both moments in and out.

    Moments have the parameter's dtype, as torch's; in `pkm.optim.SparseAdam` at least 4 bytes.
    """
    width = point.heads * point.query_dim
    keys = width * (point.num_subkeys if point.keys == "product" else point.num_slots)
    values = (distinct if point.sparse_grad else point.num_slots) * point.value_dim
    others = keys + point.dim * width
    elements = others + values
    gradients = elements
    own = point.implementation == "pkm_triton" and point.sparse_grad
    moments = others * point.itemsize + values * (max(4, point.itemsize) if own else point.itemsize)
    if point.pass_name == "fused-step":
        # Of the values the factors are read: the output's gradient, slots and weights.
        reads = point.tokens * point.heads * point.top_k
        gradients += point.tokens * point.value_dim + 2 * reads - values
    return (point.itemsize * (gradients + 2 * elements) + 4 * moments) * point.steps


def moved_bytes(point: Point, distinct: int) -> int:
    """Compulsory bytes of a whole pass."""
    return (
        query_bytes(point)
        + lookup_bytes(point)
        + gather_bytes(point, distinct)
        + step_bytes(point, distinct)
    )


def lookup_share(point: Point, lookup_ms: float, device_bandwidth: float) -> float:
    """Share of the device's memory bandwidth that the lookup's compulsory bytes take."""
    return lookup_bytes(point) / device_bandwidth / (lookup_ms / 1e3)


def copy_bandwidth(device: str, num_bytes: int = 2**30) -> float:
    """Bytes a second that a copy on this device just moved, reads and writes together."""
    source = torch.empty(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device)


def copied_here(device: str) -> float:
    """`copy_bandwidth`, measured once a process; on a CPU once for each number of threads."""
    return _copied(device, 0 if device == "cuda" else torch.get_num_threads())


@functools.cache
def _copied(device: str, threads: int) -> float:
    return copy_bandwidth(device, 2**30 if device == "cuda" else 2**27)


def product_rate(device: str, size: int = 8192) -> float:
    """Floating-point operations a second of a bfloat16 product of square matrices just now."""
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(matrix)
    return 2 * size**3 / _seconds(lambda: torch.mm(matrix, matrix, out=out), device)


@functools.cache
def multiplied_here(device: str) -> float:
    """`product_rate`, measured once a process; NaN on a CPU, where it would take minutes."""
    return product_rate(device) if device == "cuda" else math.nan


def _seconds(run: Callable[[], object], device: str, turns: int = 10) -> float:
    """The shortest of some turns: what the device can do, not what it did."""
    found: list[float] = []
    for _ in range(turns):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: str) -> float | None:
    """Peak bytes per second of the GPU's memory, None where torch does not know it."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties()
    # Clock in kHz, two transfers a clock, bus width in bits.
    clock = getattr(properties, "memory_clock_rate", 0)
    bus = getattr(properties, "memory_bus_width", 0)
    return 2e3 * clock * bus / 8 or None
