"""Measure a grid of points into a CSV, and make tables and pictures from it.

Without arguments: speed and memory of product and flat keys from 16k to 1M slots, on the GPU if
there is one. A sweep that was stopped goes on where it was when the same command is given again.
Under torchrun, --ranks 1 2 4 spreads the values over as many of its processes:
torchrun --nproc-per-node 4 -m pkm_triton.perf sweep --ranks 1 2 4
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from pkm_triton.perf.records.environment import (
    check_seed,
    check_threads,
    device_name,
    resolve_device,
)
from pkm_triton.perf.records.files import ensure_writable
from pkm_triton.perf.records.points import (
    DTYPES,
    IMPLEMENTATIONS,
    KEYS,
    LAYOUTS,
    NORMS,
    PASSES,
    READS,
    Point,
)
from pkm_triton.perf.records.sweep_row import CSV_NAME, RowFile

from .predict import predicted_sweep_seconds
from .presets import PRESETS, make_points
from .run import Limits, open_points, reason_to_skip, run_sweep

_NUMBERS = {
    "num_subkeys": "sub-keys per codebook, |C|; the memory has |C|² slots",
    "top_k": "slots read per head",
    "heads": "heads",
    "dim": "width of a token",
    "value_dim": "width of a value",
    "query_dim": "width of one head's query",
    "tokens": "tokens in one call",
    "threads": "CPU threads",
    "ranks": "processes over which the values are spread; start as many with torchrun",
}
_WORDS = {
    "implementation": IMPLEMENTATIONS,
    "keys": KEYS,
    "query_norm": NORMS,
    "dtype": tuple(DTYPES),
    "reads": READS,
    "layout": LAYOUTS[1:],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf sweep`."""
    parser.add_argument(
        "--preset",
        help=f"the grid: {', '.join(PRESETS)} (default: default, or ranks where --ranks is given)",
    )
    parser.add_argument(
        "--grid-only",
        action="store_true",
        help="measure the product of the axes given here and nothing of a preset",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the points and about how long they will take, and measure nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sweep-output"),
        help="folder for CSV, tables and pictures (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--timing",
        help="eager: as a user calls it; graph: forward passes from a CUDA graph too, the column "
        "graph_ms, which is what the kernels alone take (default: graph on a GPU)",
    )
    parser.add_argument(
        "--seconds", type=float, help="time to spend on each point and again on its parts"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="skip a point whose single pass is predicted to take longer (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="skip a point predicted to need more (default: what is available)",
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="measure again the points that are not ok, or whose row carries a remark (with those "
        "that it is compared with)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters, inputs and reads")
    axes = parser.add_argument_group("axes", "each replaces that axis in every grid of the preset")
    for name, text in _NUMBERS.items():
        axes.add_argument(_flag(name), type=int, nargs="+", metavar="N", help=text)
    for name, allowed in _WORDS.items():
        axes.add_argument(_flag(name), nargs="+", metavar="NAME", help=", ".join(allowed))
    axes.add_argument("--pass", dest="pass_name", nargs="+", metavar="NAME", help=", ".join(PASSES))
    axes.add_argument(
        "--sparse-grad",
        nargs="+",
        metavar="yes|no",
        help="whether the gradient of the values is sparse",
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(arguments: argparse.Namespace) -> int:
    """Check everything, measure, and say what was written.

    Raises:
        ValueError: an argument is not allowed, the folder cannot be written, or its CSV is of
            another version. Nothing has been measured or written then.
    """
    name = arguments.preset or ("default" if arguments.ranks is None else "ranks")
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is unknown; allowed: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    device = resolve_device(arguments.device)
    points = make_points(
        None if arguments.grid_only else name,
        _replaced_axes(arguments),
        device=device,
        all_threads=torch.get_num_threads(),
    )
    for point in points:
        check_threads(point.threads)
    seed = check_seed(arguments.seed)
    memory = arguments.memory_limit
    limits = Limits(
        seconds=preset.seconds if arguments.seconds is None else arguments.seconds,
        pass_seconds=arguments.time_limit,
        memory_bytes=None if memory is None else memory * 2**30,
        graphs=_with_graphs(arguments.timing, device),
    )
    folder: Path = arguments.output
    path = folder / CSV_NAME
    file = RowFile(path)
    todo = open_points(points, file, limits, seed, arguments.retry)
    tried = [point for point in todo if reason_to_skip(point, file.rows, limits) is None]
    *lines, total = _plan(todo, points, predicted_sweep_seconds(tried, limits.seconds), limits)
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which all come here
    if arguments.dry_run:
        if first:
            print("\n".join([*lines, total]))
        return 0
    ensure_writable(folder)
    if first:
        print(total, file=sys.stderr)
    try:
        options = {"retry": arguments.retry, "seed": seed}
        if arguments.ranks is not None or any(point.ranks > 1 for point in points):
            from pkm_triton.perf.measure.ranks import ranks_of_torchrun

            from .over_ranks import sweep_over_ranks

            with ranks_of_torchrun(device) as ranks:
                measured = sweep_over_ranks(points, file, limits, ranks, **options)
        else:
            measured = run_sweep(points, file, limits, **options)
    except KeyboardInterrupt:
        print(
            f"\nStopped; {len(file.rows)} rows are in {path}. "
            "The same command goes on with the points that are missing.",
            file=sys.stderr,
        )
        return 130
    if not first:
        return 0
    counts = Counter(row.status.partition(":")[0] for row in file.rows)
    print(
        f"{measured} points measured, {len(points) - measured} were there already; in the file: "
        + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    )
    remarks = [row.remark for row in file.rows if row.remark]
    if remarks:
        print(
            f"Of {len(remarks)} rows the times are not to be relied on ({remarks[-1]}); the column "
            "'remark' says which. The same command with --retry measures them again.",
            file=sys.stderr,
        )
    print(path)
    _report(file, folder)
    rows = [file.get(point, device_name(point.device), seed, limits.seconds) for point in points]
    if not any(row is not None and row.ok for row in rows):
        last = next(row for row in reversed(rows) if row is not None)
        print(f"No point could be measured; the last one: {last.status}", file=sys.stderr)
        return 1
    return 0


def _with_graphs(timing: str | None, device: str) -> bool:
    if timing not in (None, "eager", "graph"):
        raise ValueError(f"timing: {timing!r} is unknown; allowed: eager, graph")
    if timing == "graph" and device != "cuda":
        raise ValueError("timing: 'graph' needs a GPU; allowed on a CPU: eager")
    return timing != "eager"


def _report(file: RowFile, folder: Path) -> None:
    """Tables and pictures, where the library that draws them is installed."""
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed: no tables and pictures; pkm-perf plot makes them later")
        return
    from pkm_triton.perf.report.write import write_report

    written = write_report(file.rows, folder)
    for path in written:
        print(path)
    if not any(path.suffix == ".png" for path in written):
        print("no picture: no axis has two values, or two implementations, that were measured")


def _plan(
    todo: Sequence[Point], points: Sequence[Point], span: tuple[float, float], limits: Limits
) -> list[str]:
    """The points still to be measured, a line each, and about how long they will take."""
    lines = [f"{point.label()} {point.dtype} {point.query_norm}" for point in todo]
    total = (
        f"{len(todo)} of {len(points)} points are to be measured on "
        f"{device_name(points[0].device)}, in about {_span(*span)}, "
        f"and longer where one pass takes longer than {limits.seconds:g} s"
    )
    return [*lines, total]


def _span(least: float, most: float) -> str:
    """Two times, in seconds where both are short."""
    if most < 120:
        return f"{least:.0f} to {most:.0f} seconds"
    return f"{least / 60:.1f} to {most / 60:.1f} minutes"


def _replaced_axes(arguments: argparse.Namespace) -> dict[str, list[object]]:
    replaced = {
        name: given
        for name in (*_NUMBERS, *_WORDS, "pass_name")
        if (given := getattr(arguments, name)) is not None
    }
    if arguments.sparse_grad is not None:
        named = {"yes": True, "no": False}
        for word in arguments.sparse_grad:
            if word not in named:
                raise ValueError(f"sparse-grad: {word!r} is unknown; allowed: yes, no")
        replaced["sparse_grad"] = [named[word] for word in arguments.sparse_grad]
    return replaced
