"""Time passes against each other, and turn a built point into the figures of a row."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pkm_triton.perf.records.points import Point

from . import roofline
from .collectives import CollectiveBytes
from .memory import measure_peak
from .workload import Parts, Pass, Workload

try:
    import psutil
except ModuleNotFoundError:  # `pkm-perf check` does without
    psutil = None

MIN_SAMPLES = 3
ROUND_SECONDS = 0.02
"""A turn of one pass in a round: long enough to be at home in the caches again."""
UNEVEN = 0.3
"""The 80th percentile above the 20th, over the median: from here on a row carries a remark."""
STEADY = 0.1
"""Passes that differ by more than this are timed for longer."""
PATIENCE = 3
"""How many times the time asked for a pass may take until it is steady."""


@dataclass(frozen=True)
class Timing:
    """How long one pass takes.

    Attributes:
        median_ms, low_ms, high_ms: median, 20th and 80th percentile, milliseconds.
        samples: passes timed.
        cpu_ms: median CPU time, all threads together; on a GPU, of the launches.
        others: cores' worth of CPU time that other processes took meanwhile; NaN without psutil.
        remark: `busy: why` or `uneven: how much`, or empty.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    cpu_ms: float
    others: float
    remark: str


def time_passes(
    passes: Sequence[Pass],
    *,
    seconds: float | Sequence[float],
    device: str = "cpu",
    min_samples: int = MIN_SAMPLES,
) -> list[Timing]:
    """Time passes in interleaved rounds, so that a slow spell of the machine hits all of them.

    Each pass runs once to warm up, which counts only if it took longer than `seconds`. Then
    rounds follow, in which each pass runs for a turn of some milliseconds, until each has run for
    `seconds` and `min_samples` times, and then on, up to three times as long, while its samples
    differ by more than a tenth.

    Args:
        passes: what to time.
        seconds: time to spend on each; one figure for all, or one each.
        device: `cpu`, or `cuda` (CUDA events, with the L2 cache cleared before each pass).
        min_samples: passes to time at least.
    """
    budget = [seconds] * len(passes) if isinstance(seconds, float | int) else list(seconds)
    time_once = _CudaTimer() if device == "cuda" else _time_on_cpu
    others = _Others()
    first = [time_once(each) for each in passes]
    turns = [_turn(taken.wall) for taken in first]
    samples = [
        [taken] if taken.wall > allowed else []
        for taken, allowed in zip(first, budget, strict=True)
    ]
    spent = [sum(sample.wall for sample in taken) for taken in samples]

    def finished(place: int) -> bool:
        if spent[place] < budget[place] or len(samples[place]) < min_samples:
            return False
        return spent[place] >= PATIENCE * budget[place] or _spread(samples[place]) <= STEADY

    while not all(map(finished, range(len(passes)))):
        for place, each in enumerate(passes):
            if finished(place):
                continue
            started = time.perf_counter()
            samples[place] += [time_once(each) for _ in range(turns[place])]
            spent[place] += time.perf_counter() - started
    taken = others.cores()
    # What runs on a GPU needs one core.
    threads = 1 if device == "cuda" else torch.get_num_threads()
    return [_timing(each, taken, threads) for each in samples]


def time_so_often(each: Pass, count: int, device: str) -> Timing:
    """Time a pass `count` times: where other ranks must run it as often."""
    time_once = _CudaTimer() if device == "cuda" else _time_on_cpu
    others = _Others()
    samples = [time_once(each) for _ in range(count)]
    return _timing(samples, others.cores(), 1 if device == "cuda" else torch.get_num_threads())


@dataclass(frozen=True)
class _Sample:
    """Seconds of one pass: of the clock, and of all of the process's threads."""

    wall: float
    cpu: float


def _turn(seconds: float) -> int:
    """Passes in a turn, from the time of one."""
    return max(1, min(1000, round(ROUND_SECONDS / max(seconds, 1e-9))))


def _quantiles(samples: Sequence[_Sample]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th percentile of the time, seconds."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    times = torch.tensor([sample.wall for sample in samples], dtype=torch.float64)
    low, median, high = times.quantile(quantiles).tolist()
    return low, median, high


def _spread(samples: Sequence[_Sample]) -> float:
    low, median, high = _quantiles(samples)
    return (high - low) / median


def _timing(samples: Sequence[_Sample], others: float, threads: int) -> Timing:
    low, median, high = (1e3 * value for value in _quantiles(samples))
    # Not `median`, which takes the lower of the two in the middle.
    cpu = torch.tensor([sample.cpu for sample in samples], dtype=torch.float64).quantile(0.5).item()
    remark = _remark(others, (high - low) / median, threads)
    return Timing(median, low, high, len(samples), cpu * 1e3, others, remark)


def _remark(others: float, spread: float, threads: int) -> str:
    cores = os.cpu_count() or 1
    # A quarter of a core is what the system itself takes now and then.
    if others + threads > cores + 0.25:
        return f"busy: other processes took {others:.1f} of {cores} cores"
    if spread > UNEVEN:
        return f"uneven: from the 20th to the 80th percentile {spread:.0%} of the median"
    return ""


class _Others:
    """CPU time of other processes since this was made; of other machines on the same host too."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = self._now()

    def cores(self) -> float:
        """Cores' worth of it."""
        wall, busy, own = self._now()
        taken = (busy - self._busy) - (own - self._own)
        return math.nan if math.isnan(taken) else max(0.0, taken) / max(wall - self._wall, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        if psutil is None:
            return math.nan, math.nan, math.nan
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # Guests are counted among the user's time as well.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        return time.perf_counter(), sum(times) - idle - guests, time.process_time()


def _time_on_cpu(each: Pass) -> _Sample:
    each.clear()
    cpu = time.process_time()
    started = time.perf_counter()
    each.run()
    wall = time.perf_counter() - started
    return _Sample(wall, time.process_time() - cpu)


class _CudaTimer:
    """A pass between two CUDA events, from a cold L2 cache.

    The clearing is before the first event. While it runs a pass would be launched unseen, unless
    it is waited for.
    """

    def __init__(self) -> None:
        size = max(2**28, 2 * getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))
        self._cache = torch.empty(size, dtype=torch.int8, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, each: Pass) -> _Sample:
        each.clear()
        self._cache.zero_()
        if not each.queued:
            torch.cuda.synchronize()
        cpu = time.process_time()
        self._start.record()
        each.run()
        self._end.record()
        cpu = time.process_time() - cpu
        self._end.synchronize()
        return _Sample(self._start.elapsed_time(self._end) / 1e3, cpu)


def measure_group(
    points: Sequence[Point],
    workloads: Sequence[Workload],
    *,
    seconds: float,
    graphs: bool = True,
) -> list[dict[str, Any]]:
    """Measure built points that are to be compared: times interleaved, then memory and parts.

    Args:
        points: what the workloads were built from; all on one device.
        workloads: one for each point.
        seconds: time to spend on each pass, and as much again on its parts together.
        graphs: whether to time forward passes on a GPU from CUDA graphs too.

    Returns:
        The measured columns of each point's row.
    """
    device = points[0].device
    wholes = [each.whole for each in workloads]
    parts = [each.parts() for each in workloads]
    # The parts are timed in the same rounds: what slows the whole slows them too.
    passes = [*wholes, *(part for each in parts if each is not None for part in each.passes())]
    budget = [seconds] * len(wholes) + [seconds / 3] * (len(passes) - len(wholes))
    timings = time_passes(passes, seconds=budget, device=device)
    of_wholes, of_parts = timings[: len(wholes)], iter(timings[len(wholes) :])
    return [
        _speed(point, timing)
        | {"first_call_s": workload.first_call_s, "compile_s": workload.compile_s}
        | {"graph_ms": _graph_ms(point, workload, seconds) if graphs else math.nan}
        | _memory(point, workload)
        | ({} if each is None else _traffic(point, each, timing) | _times(each, of_parts))
        for point, workload, each, timing in zip(points, workloads, parts, of_wholes, strict=True)
    ]


def measure_rank(
    point: Point, workload: Workload, *, seconds: float, agree: Callable[[float], float]
) -> dict[str, Any]:
    """Measure a point together with the ranks that share it.

    Args:
        point: what the workload was built from.
        workload: this rank's.
        seconds: time to spend.
        agree: gives all of them the first rank's number.
    """
    once = time_so_often(workload.whole, 1, point.device).median_ms / 1e3
    count = int(agree(max(MIN_SAMPLES, min(1000, seconds / max(once, 1e-6)))))
    timing = time_so_often(workload.whole, count, point.device)
    workload.whole.clear()
    with CollectiveBytes() as counted:
        workload.whole.run()
    return (
        _speed(point, timing)
        | {"first_call_s": workload.first_call_s, "compile_s": workload.compile_s}
        | _memory(point, workload)
        | {"counted_bytes": float(counted.sent)}
    )


def _speed(point: Point, timing: Timing) -> dict[str, Any]:
    return {
        "copy_bytes_per_s": roofline.copied_here(point.device),
        "product_flops_per_s": roofline.multiplied_here(point.device),
        "median_ms": timing.median_ms,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
        "samples": timing.samples,
        "cpu_ms": timing.cpu_ms,
        "others": timing.others,
        "remark": timing.remark,
        "tokens_per_s": point.ranks * point.tokens / timing.median_ms * 1e3,
    }


def _graph_ms(point: Point, workload: Workload, seconds: float) -> float:
    """The pass replayed from a CUDA graph; NaN on a CPU, and where it cannot be captured."""
    if point.device != "cuda" or point.pass_name != "forward":
        return math.nan
    try:
        replay = workload.whole.captured()
    except RuntimeError:
        return math.nan
    (timing,) = time_passes([replay], seconds=seconds / 3, device="cuda")
    return timing.median_ms


def _memory(point: Point, workload: Workload) -> dict[str, Any]:
    workload.whole.clear()
    peak = measure_peak(workload.whole.run, workload.whole.gradients, device=point.device)
    workload.whole.clear()
    return {
        "peak_bytes": float(peak.peak_bytes),
        "working_bytes": float(peak.working_bytes),
        "parameter_bytes": float(workload.parameter_bytes),
    }


def _traffic(point: Point, parts: Parts, timing: Timing) -> dict[str, Any]:
    moved = roofline.moved_bytes(point, parts.distinct_slots)
    columns = {"moved_bytes": float(moved)}
    bandwidth = roofline.bandwidth(point.device)
    if bandwidth:
        columns["roofline"] = moved / bandwidth / (timing.median_ms / 1e3)
    return columns


def _times(parts: Parts, timings: Iterator[Timing]) -> dict[str, Any]:
    for part in parts.passes():
        part.clear()
    return {f"{name}_ms": next(timings).median_ms for name in Parts.NAMES}
