"""Make the tables and pictures of a sweep again, from its CSV."""

import argparse
from pathlib import Path

from pkm_triton.perf.records.files import ensure_writable
from pkm_triton.perf.records.sweep_row import CSV_NAME, csv_path, read_rows

from .write import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf plot`."""
    parser.add_argument(
        "csv",
        nargs="?",
        type=Path,
        default=Path("sweep-output") / CSV_NAME,
        help="CSV of a sweep, or the folder it lies in (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for tables and pictures (default: that of the CSV)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read the CSV, write the report, and say what was written.

    Raises:
        ValueError: the CSV cannot be read, or the folder cannot be written.
    """
    path = csv_path(arguments.csv)
    rows = read_rows(path)
    folder: Path = arguments.output or path.parent
    ensure_writable(folder)
    for written in write_report(rows, folder):
        print(written)
    return 0
