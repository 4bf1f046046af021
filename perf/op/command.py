"""Time one op or gradient, side by side with another checkout; refused where its check fails.

The two run in a process each and take turns, so that a slow spell of the machine hits both. What an
op must move at least is counted by the formula that is printed.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch

from pkm_triton.perf.check import planning
from pkm_triton.perf.check.outcome import FAIL
from pkm_triton.perf.check.run import do
from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.environment import check_threads, resolve_device

from .checkouts import Timed, require_checkout, time_checkouts
from .shapes import OPS, SHAPES, Shape, parse_shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf op`."""
    parser.add_argument("name", help=f"the op: {', '.join(OPS)}")
    parser.add_argument(
        "--shape",
        default=None,
        help=f"{', '.join(SHAPES)} (default: usual on a GPU, tiny on a CPU)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SIZE=VALUE", help="change a size, as tokens=64"
    )
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="compare with that checkout")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time for each checkout (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and print.

    Raises:
        ValueError: an argument is not allowed, or the op cannot be run.
    """
    name = arguments.name
    if name not in OPS:
        raise ValueError(f"op: {name!r} is unknown; allowed: {', '.join(OPS)}")
    device = resolve_device(arguments.device)
    shape = parse_shape(arguments.shape or ("usual" if device == "cuda" else "tiny"), arguments.set)
    if not 0 < arguments.seconds < math.inf:
        raise ValueError(f"seconds: {arguments.seconds} is not allowed; give a number above 0")
    threads = torch.get_num_threads()
    if arguments.threads is not None:
        threads = check_threads(arguments.threads)
    if arguments.base is not None:
        require_checkout(arguments.base)
    wrong = _failures(name, device)
    if wrong:
        print(f"{name} is not timed, for it is wrong: {'; '.join(wrong)}")
        return 1
    bases = [None] if arguments.base is None else [None, arguments.base]
    found = time_checkouts(
        bases, name, shape, device=device, threads=threads, seconds=arguments.seconds
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        print(report(name, shape, found, roofline.copied_here(device)))
    finally:
        torch.set_num_threads(before)
    return 0


def _failures(name: str, device: str) -> list[str]:
    """The checks of the op that fail here."""
    backend = "triton" if device == "cuda" else "torch"
    with planning.prepared(backend, None) as where:
        checks = planning.make_checks(where, quick=True, with_speed=False, only=[OPS[name].check])
        lines = do(checks)
        return [line.name for line in lines if line.outcome.status == FAIL]


def report(name: str, shape: Shape, found: list[Timed], copy: float) -> str:
    """Milliseconds, bytes a second, and the ratio to the other checkout."""
    op = OPS[name]
    moved = op.bytes(name, shape)
    sizes = ", ".join(f"{key} {value}" for key, value in vars(shape).items())
    lines = [
        f"{name}: {sizes}",
        f"must move {moved / 1e6:,.2f} MB = {op.formula}; a copy here moves {copy / 1e9:,.1f} GB/s",
    ]
    medians = [statistics.median(each.seconds) for each in found]
    for label, each, median in zip(("this checkout", "base"), found, medians, strict=False):
        ordered = sorted(each.seconds)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        rate = moved / median
        lines.append(
            f"{label}: {median * 1e3:.4f} ms ({low * 1e3:.4f} to {high * 1e3:.4f}, "
            f"{len(ordered)} calls), {rate / 1e9:,.1f} GB/s, {rate / copy:.0%} of the copy, "
            f"first call {each.first:.2f} s"
        )
    if len(medians) == 2:
        lines.append(f"this checkout / base: {medians[0] / medians[1]:.3f}")
    return "\n".join(lines)
