"""What the compiler makes of the kernels, for several GPUs and without any of them.

Each kernel file names its shipped configurations as calls of its launcher on tensors without data.
The launches are recorded instead of run, and compiled ahead of time: the report cannot disagree
with what a GPU would be given.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pkm_triton.kernels.chip import chip_of
from pkm_triton.perf.records.files import ensure_writable, write_whole

from .launches import compile_configuration, shipped_configurations

ARCHITECTURES = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
    "gfx942", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip

HERE = "here"

COLUMNS = (
    "configuration", "kernel", "architecture", "aligned", "registers", "spilled", "shared",
    "occupancy", "load", "store", "atomics", "barriers", "instructions", "bytes", "cpu_seconds",
    "offsets",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pkm-perf kernels`."""
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=ARCHITECTURES,
        choices=(*ARCHITECTURES, HERE),
        help=f"what to compile for; {HERE}: the GPU of this machine (default: all)",
    )
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--unaligned", action="store_true", help="also pointers of no alignment")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--processes", type=int, default=2)


def run(args: argparse.Namespace) -> int:
    """Print the table of `pkm-perf kernels`, and write it if asked to."""
    if args.json:
        ensure_writable(args.json.absolute().parent, "json")
    architectures = [architecture_here() if each == HERE else each for each in args.architectures]
    rows: list[dict[str, Any]] = []
    for row in report(architectures, args.only, args.unaligned, args.processes):
        if not rows:
            print(" | ".join(COLUMNS))
        print(" | ".join(str(row[column]) for column in COLUMNS), flush=True)
        rows.append(row)
    if args.json:
        write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    return 0


def architecture_here() -> str:
    """The architecture of the GPU that is current.

    Raises:
        ValueError: there is none, or it is not among ARCHITECTURES.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"architectures: {HERE!r} needs a GPU; name one")
    found = chip_of(torch.device("cuda")).architecture
    if found not in ARCHITECTURES:
        raise ValueError(f"architectures: this GPU's, {found}, is not among those that are known")
    return found


def report(
    architectures: Any = ARCHITECTURES, only: str = "", unaligned: bool = False, processes: int = 2
) -> Iterator[dict[str, Any]]:
    """A row for each kernel, shipped configuration and architecture, as soon as it is there.

    Args:
        architectures: of ARCHITECTURES.
        only: what the configurations' names hold; all do where it is empty.
        unaligned: whether to compile for pointers of no alignment, too.
        processes: that compile at once.

    Raises:
        ValueError: no configuration's name holds `only`, or `processes` is not positive.
    """
    if processes < 1:
        raise ValueError(f"processes: {processes} is too small; at least 1 is needed")
    names = list(shipped_configurations())
    chosen = [name for name in names if only in name]
    if not chosen:
        raise ValueError(
            f"only: {only!r} is in no configuration's name; allowed: parts of {', '.join(names)}"
        )
    jobs = [
        (name, architecture, aligned)
        for name in chosen
        for architecture in architectures
        for aligned in ((True, False) if unaligned else (True,))
    ]
    with ProcessPoolExecutor(processes) as pool:
        for rows in pool.map(compile_configuration, jobs):
            yield from rows
