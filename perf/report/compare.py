"""Compare the medians of two sweeps, point by point."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from pkm_triton.perf.records.sweep_row import Row, csv_path, point_of, read_rows

from .plot_style import number
from .slices import reliability
from .table import markdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf compare`."""
    parser.add_argument("a", type=Path, help="CSV of the first sweep, or its folder")
    parser.add_argument("b", type=Path, help="CSV of the second sweep, or its folder")


def run(arguments: argparse.Namespace) -> int:
    """Print a Markdown table with the ratio of medians of every point that both CSVs hold.

    Raises:
        ValueError: a CSV cannot be read, or no point is in both.
    """
    print(comparison(*(read_rows(csv_path(each)) for each in (arguments.a, arguments.b))))
    return 0


def comparison(first: Sequence[Row], second: Sequence[Row]) -> str:
    """The table: B / A above 1 means that the second sweep took longer.

    Points are matched by their parameters and the seed, whatever the device and the time spent,
    so that two machines can be compared as well as two versions; of several rows of one point the
    last counts.

    Raises:
        ValueError: no point was measured in both.
    """
    ours, theirs = (
        {(point_of(row), row.seed): row for row in rows if row.ok} for rows in (first, second)
    )
    pairs = [(row, theirs[key]) for key, row in ours.items() if key in theirs]
    if not pairs:
        raise ValueError("A, B: no point with status 'ok' is in both files")
    ratios = [other.median_ms / row.median_ms for row, other in pairs]
    lines = [
        [
            _describe(row),
            number(row.median_ms),
            number(other.median_ms),
            f"{ratio:.3f}",
            f"{other.working_bytes / row.working_bytes:.3f}" if row.working_bytes else "–",
        ]
        for (row, other), ratio in zip(pairs, ratios, strict=True)
    ]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    table = markdown(["point", "A (ms)", "B (ms)", "time B / A", "memory B / A"], lines)
    others = len({(point_of(row), row.seed) for row in (*first, *second)}) - len(pairs)
    return (
        f"{table}\n\n{len(pairs)} points in both, geometric mean of B / A: {mean:.3f}; "
        f"{others} others in one file only or not measured. "
        f"{reliability(row for pair in pairs for row in pair)}"
    ).rstrip()


def _describe(row: Row) -> str:
    gradient = f" {'sparse' if row.sparse_grad else 'dense'}" if row.backward else ""
    return f"{row.label()}{gradient} {row.dtype} {row.reads} threads={row.threads}".replace(
        "|", "\\|"
    )
