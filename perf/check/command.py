"""Prove the library on this machine: numerics, determinism, machinery, and on a GPU speed.

Needs torch and triton alone. Ends with exit status 0 only if every check passed. The page that it
writes can be pasted into an issue.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from pkm_triton.perf.records.files import ensure_writable, write_whole

from .outcome import Check, Line, Report, counts
from .page import markdown, terminal_line

JSON_NAME, PAGE_NAME = "check.json", "check.md"
_WRITE_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf check`."""
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--no-speed", action="store_true", help="leave the measurements out")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="checks whose group and name hold one of these"
    )
    parser.add_argument(
        "--backend",
        default="triton",
        help="what is checked: triton (kernels, on a GPU or interpreted) or torch (the reference, "
        "on a CPU) (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("check-output"),
        help=f"folder for {JSON_NAME} and {PAGE_NAME} (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start no check after so long"
    )
    parser.add_argument("--plant", metavar="NAME", help="plant a known bug, which must be found")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="print the page of a recorded JSON, no more"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, print lines as they come, and write the report.

    Raises:
        ValueError: an argument is not allowed, the folder cannot be written, or there is nothing
            here that could run the kernels.
    """
    if arguments.render is not None:
        print(markdown(_read(arguments.render)), end="")
        return 0
    # Torch takes seconds to import, and rendering does without.
    from . import machine, planning
    from .ahead import compile_ahead
    from .run import do

    limit = arguments.time_limit
    if limit is not None and not limit > 0:
        raise ValueError(f"time-limit: {limit} is not allowed; give a number above 0")
    folder: Path = arguments.output
    with (
        planning.prepared(arguments.backend, arguments.plant) as device,
        machine.compiling(arguments.backend) as compiled,
    ):
        checks = planning.make_checks(
            device, quick=arguments.quick, with_speed=not arguments.no_speed, only=arguments.only
        )
        ensure_writable(folder)
        facts = machine.describe(device)
        facts["clocks before"] = machine.clocks(device)
        options = {name: getattr(arguments, name) for name in ("quick", "only", "backend", "plant")}
        report = Report(facts, options, [], compiled=compiled)
        clock = _Clock(limit)
        if arguments.backend == "triton":
            compile_ahead(checks, device)
        for line in do(clock.until_the_end(checks)):
            report.lines.append(line)
            _show(line, len(report.lines), len(checks))
            if clock.is_time_to_write():
                _write(report, folder)
        facts["clocks after"] = machine.clocks(device)
    report.complete = len(report.lines) == len(checks)
    _write(report, folder)
    return _verdict(report, folder, clock.seconds())


class _Clock:
    def __init__(self, limit: float | None) -> None:
        self._limit, self._started = limit, time.monotonic()
        self._written = self._started

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def is_time_to_write(self) -> bool:
        now = time.monotonic()
        due = now - self._written >= _WRITE_SECONDS
        self._written = now if due else self._written
        return due

    def until_the_end(self, checks: list[Check]):
        for check in checks:
            if self._limit is not None and self.seconds() > self._limit:
                return
            yield check


def _show(line: Line, done: int, count: int) -> None:
    if sys.stderr.isatty():
        width = 30
        bar = "#" * (width * done // count)
        print(f"\r\033[K{terminal_line(line)}", file=sys.stderr)
        print(f"\r[{bar:<{width}}] {done}/{count}", end="", file=sys.stderr, flush=True)
    else:
        print(f"[{done}/{count}] {terminal_line(line)}", flush=True)


def _write(report: Report, folder: Path) -> None:
    write_whole(folder / JSON_NAME, json.dumps(report.as_json(), indent=1) + "\n")
    write_whole(folder / PAGE_NAME, markdown(report))


def _verdict(report: Report, folder: Path, seconds: float) -> int:
    if sys.stderr.isatty():
        print(file=sys.stderr)
    found = ", ".join(f"{count} {name}" for name, count in counts(report.lines).items())
    for line in report.failed:
        print(terminal_line(line))
    if report.compiled:
        every = [each for seconds in report.compiled.values() for each in seconds]
        print(
            f"Compiled {len(every)} times, {sum(every):.0f} s in all, {max(every):.1f} s the "
            f"longest, {len(report.compiled)} kernels; each in {PAGE_NAME}"
        )
    word = report.verdict if report.complete else f"{report.verdict}: time is up"
    planted = report.arguments["plant"]
    if planted:
        word += f", with {planted} planted"
    print(f"{word}: {found}, in {seconds:.0f} s; {folder / JSON_NAME}, {folder / PAGE_NAME}")
    return 0 if report.verdict in ("PASS", "MEASURED") else 1


def _read(path: Path) -> Report:
    try:
        return Report.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"render: {str(path)!r} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"render: {str(path)!r} is no JSON: {error}") from error
