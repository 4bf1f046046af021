"""Time passes against each other, and turn a built point into the figures of a row."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pkm_triton.perf.records.points import Point

from . import roofline
from .memory import measure_peak
from .workload import Pass, Workload

MIN_SAMPLES = 3
ROUND_SECONDS = 0.02
"""A turn of one pass in a round: long enough to be at home in the caches again."""


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of the time of one pass, milliseconds."""

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int


def time_passes(
    passes: Sequence[Pass],
    *,
    seconds: float,
    device: str = "cpu",
    min_samples: int = MIN_SAMPLES,
) -> list[Timing]:
    """Time passes in interleaved rounds, so that a slow spell of the machine hits all of them.

    Each pass runs once to warm up, which counts only if it took longer than `seconds`. Then
    rounds follow, in which each pass runs for a turn of some milliseconds, until each has run for
    `seconds` and `min_samples` times.

    Args:
        passes: what to time.
        seconds: time to spend on each.
        device: `cpu`, or `cuda` (CUDA events, with the L2 cache cleared before each pass).
        min_samples: passes to time at least.
    """
    time_once = _CudaTimer() if device == "cuda" else _time_on_cpu
    first = [time_once(each) for each in passes]
    turns = [_turn(taken) for taken in first]
    samples = [[taken] if taken > seconds else [] for taken in first]
    spent = [sum(taken) for taken in samples]

    def finished(place: int) -> bool:
        return spent[place] >= seconds and len(samples[place]) >= min_samples

    while not all(map(finished, range(len(passes)))):
        for place, each in enumerate(passes):
            if finished(place):
                continue
            started = time.perf_counter()
            samples[place] += [time_once(each) for _ in range(turns[place])]
            spent[place] += time.perf_counter() - started
    return [_timing(each) for each in samples]


def _turn(seconds: float) -> int:
    """Passes in a turn, from the time of one."""
    return max(1, min(1000, round(ROUND_SECONDS / max(seconds, 1e-9))))


def _timing(samples: Sequence[float]) -> Timing:
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist()
    return Timing(median * 1e3, low * 1e3, high * 1e3, len(samples))


def _time_on_cpu(each: Pass) -> float:
    each.clear()
    started = time.perf_counter()
    each.run()
    return time.perf_counter() - started


class _CudaTimer:
    """Seconds of a pass between two CUDA events, from a cold L2 cache."""

    def __init__(self) -> None:
        size = max(2**28, 2 * getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))
        self._cache = torch.empty(size, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, each: Pass) -> float:
        each.clear()
        self._cache.zero_()
        self._start.record()
        each.run()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def measure_group(
    points: Sequence[Point], workloads: Sequence[Workload], *, seconds: float
) -> list[dict[str, Any]]:
    """Measure built points that are to be compared: times interleaved, then memory and parts.

    Args:
        points: what the workloads were built from; all on one device.
        workloads: one for each point.
        seconds: time to spend on each pass, and as much again on its parts together.

    Returns:
        The measured columns of each point's row.
    """
    device = points[0].device
    timings = time_passes([each.whole for each in workloads], seconds=seconds, device=device)
    return [
        _speed(point, timing) | _memory(point, workload) | _parts(point, workload, timing, seconds)
        for point, workload, timing in zip(points, workloads, timings, strict=True)
    ]


def _speed(point: Point, timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": timing.median_ms,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
        "samples": timing.samples,
        "tokens_per_s": point.tokens / timing.median_ms * 1e3,
    }


def _memory(point: Point, workload: Workload) -> dict[str, Any]:
    workload.whole.clear()
    peak = measure_peak(workload.whole.run, workload.whole.gradients, device=point.device)
    workload.whole.clear()
    return {
        "peak_bytes": float(peak.peak_bytes),
        "working_bytes": float(peak.working_bytes),
        "parameter_bytes": float(workload.parameter_bytes),
    }


def _parts(point: Point, workload: Workload, timing: Timing, seconds: float) -> dict[str, Any]:
    """Each part's time, and the traffic, which needs the slots that are read."""
    parts = workload.parts()
    if parts is None:
        return {}
    moved = roofline.moved_bytes(point, parts.distinct_slots)
    columns = {"moved_bytes": float(moved)}
    bandwidth = roofline.bandwidth(point.device)
    if bandwidth:
        columns["roofline"] = moved / bandwidth / (timing.median_ms / 1e3)
    for name in ("query", "lookup", "gather"):
        part: Pass = getattr(parts, name)
        (part_timing,) = time_passes(
            [part], seconds=seconds / 3, device=point.device, min_samples=1
        )
        part.clear()
        columns[f"{name}_ms"] = part_timing.median_ms
    return columns
