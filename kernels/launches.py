"""Launches of kernels, recorded instead of run, or compiled ahead of time for this device."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, and the arguments it is launched with."""


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record what kernels would be launched with, instead of launching them."""
    launches: list[Launch] = []
    kinds: list[Any] = [JITFunction]
    # What interprets kernels is imported with the first of them, and needs NumPy.
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        kinds.append(interpreter.InterpretedFunction)
    originals = [kind.run for kind in kinds]

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    for kind in kinds:
        kind.run = record
    try:
        yield launches
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


@contextmanager
def compile_seconds() -> Iterator[dict[str, list[float]]]:
    """The time that compiling took in the block, a figure for each compilation, by kernel.

    What is read from Triton's cache is not compiled.
    """
    found: dict[str, list[float]] = {}
    knobs = triton.knobs.compilation
    before = knobs.listener

    def listen(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            found.setdefault(src.name, []).append(times.total / 1e6)
        if before is not None:
            before(src=src, times=times, cache_hit=cache_hit, **rest)

    knobs.listener = listen
    try:
        yield found
    finally:
        knobs.listener = before


def compile_launches(launches: list[Launch], threads: int) -> dict[str, list[float]]:
    """Compile what would be launched, several at once, for the device that is current.

    Returns:
        Seconds of each compilation, by kernel.
    """
    with (
        compile_seconds() as found,
        ThreadPoolExecutor(threads) as pool,
        triton.AsyncCompileMode(pool),
    ):
        for kernel, args, kwargs in launches:
            kernel.run(*args, grid=(1,), warmup=True, **kwargs)
    return found
