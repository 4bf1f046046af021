"""Do checks one by one; whatever goes wrong with one is its outcome, and the next is done."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import torch

from pkm_triton.perf.measure.memory import is_out_of_memory

from .outcome import ERROR, OOM, Check, Line, Outcome


def do(checks: Iterable[Check], clock: Callable[[], float] = time.perf_counter) -> Iterator[Line]:
    """A line for each check, as soon as it is done."""
    for check in checks:
        started = clock()
        outcome = _outcome(check)
        yield Line(check.group, check.name, outcome, clock() - started)


def _outcome(check: Check) -> Outcome:
    try:
        outcome = check.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what a kernel did wrong shows here at the latest
        return outcome
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(OOM, note=_short(error))
        return Outcome(ERROR, note=f"{type(error).__name__}: {_short(error)}")
    finally:
        if torch.cuda.is_available():
            # After an illegal access the device does nothing more.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
