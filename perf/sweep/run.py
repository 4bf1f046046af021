"""Measure the points of a sweep, each recorded as soon as it is done."""

import dataclasses
import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from pkm_triton.perf.measure.memory import available_bytes, is_out_of_memory
from pkm_triton.perf.measure.timing import measure_group
from pkm_triton.perf.measure.workload import Workload
from pkm_triton.perf.records.environment import device_name, versions
from pkm_triton.perf.records.points import COMPILED, IMPLEMENTATIONS, Point
from pkm_triton.perf.records.sweep_row import Row, RowFile

from .predict import predicted_bytes, predicted_seconds

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # on a GPU machine with torch alone: lines instead of a bar
    tqdm = None

Progress = Callable[[str, int], None]
"""Is told what is being done, and how many points were done since it was last told."""


@dataclass(frozen=True)
class Limits:
    """What a point may take.

    Attributes:
        seconds: time to spend on each pass, and as much again on its parts.
        pass_seconds: a point whose single pass is predicted to take longer is skipped.
        memory_bytes: a point predicted to need more is skipped; None for what is available.
        graphs: whether forward passes on a GPU are timed from CUDA graphs too.

    Raises:
        ValueError: a limit is not above zero.
    """

    seconds: float = 0.5
    pass_seconds: float = 30.0
    memory_bytes: float | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        for name, value in (
            ("seconds", self.seconds),
            ("time-limit", self.pass_seconds),
            ("memory-limit", self.memory_bytes),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} is not allowed; give a number above 0")
        if self.seconds == math.inf:
            raise ValueError("seconds: inf is not allowed; no point would ever be done")


def run_sweep(
    points: Sequence[Point],
    file: RowFile,
    limits: Limits,
    *,
    retry: bool = False,
    seed: int = 0,
) -> int:
    """Measure the points that `file` does not hold yet, and add a row for each.

    Points that differ in the implementation alone are timed in interleaved rounds, where memory
    holds them together. Whatever goes wrong with a point is recorded in its row, and the sweep goes
    on.

    Args:
        points: what to measure.
        file: where rows are added.
        limits: what a point may take.
        retry: whether to measure again those points whose row is not `ok` or carries a remark; with
            the latter those that it is compared with.
        seed: of parameters, inputs and generated reads.

    Returns:
        The number of points measured, skipped ones included.
    """
    todo = open_points(points, file, limits, seed, retry)
    threads = torch.get_num_threads()
    try:
        progress = progress_of(len(todo))
        for group in _groups(todo):
            progress(group[0].label(), 0)
            file.refresh()  # another process may have measured it meanwhile
            if open_points(group, file, limits, seed, retry):
                file.add(*_measure(group, file, limits, seed, progress))
            progress(group[0].label(), len(group))
    finally:
        torch.set_num_threads(threads)
    return len(todo)


def progress_of(count: int) -> Progress:
    """Is told what is measured and how many points are done, and shows it on stderr."""
    if tqdm is None:
        done = 0

        def tell(label: str, points: int) -> None:
            nonlocal done
            done += points
            print(f"{done}/{count} {label}", file=sys.stderr, flush=True)

        return tell
    bar = tqdm(total=count, unit="point", dynamic_ncols=True)

    def show(label: str, points: int) -> None:
        bar.set_description(label)
        bar.update(points)
        if bar.n >= count:
            bar.close()

    return show


def open_points(
    points: Sequence[Point], file: RowFile, limits: Limits, seed: int, retry: bool
) -> list[Point]:
    """The points that are still to be measured (see `run_sweep`)."""

    rows = {
        point: file.get(point, device_name(point.device), seed, limits.seconds) for point in points
    }
    noted = {_shared(point) for point, row in rows.items() if row is not None and row.remark}

    def is_open(point: Point) -> bool:
        row = rows[point]
        return row is None or (retry and (not row.ok or _shared(point) in noted))

    return [point for point in points if is_open(point)]


def _groups(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Points that differ in nothing but the implementation, together."""
    groups: dict[Point, list[Point]] = {}
    for point in points:
        groups.setdefault(_shared(point), []).append(point)
    yield from groups.values()


def _shared(point: Point) -> Point:
    """The same of every implementation."""
    return dataclasses.replace(point, implementation=IMPLEMENTATIONS[0])


def _measure(
    points: Sequence[Point], file: RowFile, limits: Limits, seed: int, progress: Progress
) -> list[Row]:
    """A row for each point of a group."""
    torch.set_num_threads(points[0].threads)
    outcomes: dict[Point, dict[str, Any]] = {}
    for point in points:
        reason = reason_to_skip(point, file.rows, limits)
        if reason:
            outcomes[point] = {"status": f"skipped: {reason}"}
    left = [point for point in points if point not in outcomes]
    for some in _that_fit_together(left, limits):
        outcomes.update(_measure_together(some, limits, seed, progress))
    return [row_of(point, outcomes[point], limits, seed) for point in points]


def row_of(point: Point, outcome: Mapping[str, Any], limits: Limits, seed: int) -> Row:
    """The row of a point that was measured here, with these figures or that status."""
    return Row(
        **dataclasses.asdict(point),
        device_name=device_name(point.device),
        seed=seed,
        seconds=limits.seconds,
        **versions(),
        **outcome,
    )


def _that_fit_together(points: Sequence[Point], limits: Limits) -> Iterator[list[Point]]:
    """The points, as many at a time as are predicted to fit into memory."""
    some: list[Point] = []
    for point in points:
        needed = sum(map(predicted_bytes, [*some, point]))
        if some and needed > _allowed_bytes(point, limits):
            yield some
            some = []
        some.append(point)
    if some:
        yield some


def _measure_together(
    points: Sequence[Point], limits: Limits, seed: int, progress: Progress
) -> dict[Point, dict[str, Any]]:
    """The figures, or what went wrong, of points that are in memory at the same time."""
    _forget_earlier_points(points)
    outcomes: dict[Point, dict[str, Any]] = {}
    workloads: dict[Point, Workload] = {}
    for point in points:
        try:
            if point.device == "cuda" or point.implementation in COMPILED:
                progress(f"compiling {point.label()}", 0)
            workload = Workload(point, seed=seed)
            workload.warm_up()
            workloads[point] = workload
        except Exception as error:
            outcomes[point] = {"status": _failure(error)}
    if workloads:
        outcomes.update(_measure_ready(workloads, limits))
    return outcomes


def _forget_earlier_points(points: Sequence[Point]) -> None:
    """Free their tables, some of which are in cycles, and what torch compiled for them."""
    if any(point.implementation in COMPILED for point in points):
        # After eight compilations of one function torch runs it eagerly from then on.
        torch.compiler.reset()
    gc.collect()
    if points[0].device == "cuda":
        torch.cuda.empty_cache()


def _measure_ready(workloads: Mapping[Point, Workload], limits: Limits) -> dict[Point, Any]:
    """Figures of points in interleaved rounds; where one of them fails, of each on its own."""
    points = list(workloads)
    try:
        figures = measure_group(
            points, list(workloads.values()), seconds=limits.seconds, graphs=limits.graphs
        )
        return dict(zip(points, figures, strict=True))
    except Exception as error:
        if len(points) == 1:
            return {points[0]: {"status": _failure(error)}}
    return {
        point: figures
        for each in points
        for point, figures in _measure_ready({each: workloads[each]}, limits).items()
    }


def _allowed_bytes(point: Point, limits: Limits) -> float:
    available = available_bytes(point.device)
    return available if limits.memory_bytes is None else min(limits.memory_bytes, available)


def reason_to_skip(point: Point, rows: Sequence[Row], limits: Limits) -> str | None:
    """Why a point is not tried, as far as that is known from the rows measured before it."""
    unsupported = point.unsupported()
    if unsupported:
        return unsupported
    if point.implementation == "product-key-memory" and not find_spec("product_key_memory"):
        return "the package product-key-memory is not installed (install it, and give --retry)"
    needed, allowed = predicted_bytes(point), _allowed_bytes(point, limits)
    if needed > allowed:
        limited = limits.memory_bytes is not None and allowed == limits.memory_bytes
        return (
            f"predicted memory {needed / 2**30:.1f} GiB, above the {allowed / 2**30:.1f} GiB "
            f"{'allowed (--memory-limit)' if limited else 'available'}"
        )
    seconds = predicted_seconds(point, rows)
    if seconds is not None and seconds > limits.pass_seconds:
        return (
            f"predicted time {seconds:.0f} s a pass, above the {limits.pass_seconds:g} s "
            "allowed (--time-limit)"
        )
    return None


def _failure(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 200 else text[:197] + "..."
    return f"oom: {text}" if is_out_of_memory(error) else f"failed: {type(error).__name__}: {text}"
