"""Two checkouts timed in one run: a process each, that take turns."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .shapes import Shape

_WORKER = Path(__file__).with_name("worker.py")
_FOLDERS = ("kernels", "reference", "perf")
_TURN_SECONDS = 0.05


@dataclasses.dataclass
class Timed:
    """A checkout and what its calls took, in seconds."""

    first: float
    seconds: list[float]


class _Worker:
    def __init__(
        self, folder: Path | None, op: str, shape: Shape, device: str, threads: int
    ) -> None:
        environment = dict(os.environ)
        if folder is not None:
            environment["PYTHONPATH"] = str(folder)
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        given = {"op": op, "shape": dataclasses.asdict(shape), "device": device}
        self.first: float = self._ask(json.dumps({**given, "threads": threads}))["first"]

    def run(self, turns: int) -> list[float]:
        """Seconds of so many calls."""
        return self._ask(f"run {turns}")["seconds"]

    def _ask(self, line: str) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            _, error = self._process.communicate()
            last = error.strip().splitlines()[-1:] or ["it ended without a word"]
            raise ValueError(f"op: cannot be run: {last[0]}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def require_checkout(folder: Path) -> None:
    """`folder` is a checkout of this project.

    Raises:
        ValueError: it is not.
    """
    if not all((folder / name).is_dir() for name in ("pkm_triton", *_FOLDERS)):
        raise ValueError(f"base: {str(folder)!r} is no checkout of pkm_triton")


@contextlib.contextmanager
def laid_out(checkout: Path) -> Iterator[Path]:
    """A folder in which a checkout's folders have the one import name they are installed under.

    Raises:
        ValueError: it is no checkout of this project.
    """
    require_checkout(checkout)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pkm_triton"
        package.mkdir()
        for path in (checkout / "pkm_triton").resolve().iterdir():
            (package / path.name).symlink_to(path)
        for name in _FOLDERS:
            (package / name).symlink_to((checkout / name).resolve())
        yield Path(folder)


def time_checkouts(
    bases: Sequence[Path | None],
    op: str,
    shape: Shape,
    *,
    device: str,
    threads: int,
    seconds: float,
) -> list[Timed]:
    """Time an op of several checkouts, None being this one, in rounds in which each has a turn.

    Raises:
        ValueError: a checkout is none, or the op cannot be run there.
    """
    with contextlib.ExitStack() as stack:
        workers: list[_Worker] = []
        for base in bases:
            folder = None if base is None else stack.enter_context(laid_out(base))
            workers.append(_Worker(folder, op, shape, device, threads))
            stack.callback(workers[-1].close)
        quickest = min(worker.run(1)[0] for worker in workers)
        turns = max(1, min(500, round(_TURN_SECONDS / max(quickest, 1e-9))))
        found = [Timed(worker.first, []) for worker in workers]
        started = time.monotonic()
        while len(found[0].seconds) < 3 or time.monotonic() - started < seconds * len(workers):
            for worker, timed in zip(workers, found, strict=True):
                timed.seconds += worker.run(turns)
        return found
