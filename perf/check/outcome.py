"""What a check is, what comes out of it, and the report they make. Imports nothing of torch."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PASS, FAIL, SKIP, ERROR, OOM, INFO = "PASS", "FAIL", "SKIP", "ERROR", "OUT OF MEMORY", "INFO"
MEASURED = "Speed"
"""The group of measurements, which prove nothing."""
FORMAT = 1
"""Of the JSON; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a check.

    Attributes:
        status: PASS or FAIL; SKIP where this machine has not what it takes; ERROR and OUT OF MEMORY
            where it broke off; INFO for a measurement, which cannot fail.
        error, allowed: the largest error against the oracle, and what the rule of tolerance allows.
        note: what went wrong, why it was left out, or what was measured.
        figures: of a measurement, by name.
    """

    status: str
    error: float | None = None
    allowed: float | None = None
    note: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        run: does it.
        launch: launches its kernels on tensors without data, so that they can be compiled ahead of
            time; None where that is not worth it.
    """

    group: str
    name: str
    run: Callable[[], Outcome]
    launch: Callable[[], object] | None = None


@dataclass(frozen=True)
class Line:
    """A check that was done."""

    group: str
    name: str
    outcome: Outcome
    seconds: float


@dataclass
class Report:
    """A machine and what was checked on it."""

    machine: dict[str, str]
    arguments: dict[str, Any]
    lines: list[Line]
    complete: bool = False
    """Whether all checks were done; False in what is written in between."""
    compiled: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """By kernel the seconds of each compilation; what Triton's cache had is not among them."""

    @property
    def failed(self) -> list[Line]:
        """The lines that keep the report from passing; a measurement that breaks off does not."""
        wrong = (FAIL, ERROR, OOM)
        return [
            line for line in self.lines if line.outcome.status in wrong and line.group != MEASURED
        ]

    @property
    def passed(self) -> bool:
        """Whether everything was done, something was checked, and nothing failed."""
        checked = any(line.outcome.status == PASS for line in self.lines)
        return self.complete and checked and not self.failed

    @property
    def verdict(self) -> str:
        """PASS, FAIL, NOT FINISHED, or MEASURED where there was nothing but measurements."""
        if not self.complete and not self.failed:
            return "NOT FINISHED"
        measured = any(line.outcome.status == INFO for line in self.lines)
        if measured and all(line.group == MEASURED for line in self.lines):
            return "MEASURED"
        return "PASS" if self.passed else "FAIL"

    def as_json(self) -> dict[str, Any]:
        """Plain data, to be read by `from_json`."""
        return {"format": FORMAT, "passed": self.passed, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> "Report":
        """What `as_json` made.

        Raises:
            ValueError: it is something else, or of another format.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"render: no report of pkm-perf check of format {FORMAT}")
        try:
            lines = [
                Line(**{**line, "outcome": Outcome(**line["outcome"])}) for line in data["lines"]
            ]
            compiled = data.get("compiled", {})
            return cls(data["machine"], data["arguments"], lines, data["complete"], compiled)
        except (KeyError, TypeError) as error:
            raise ValueError(f"render: the report is damaged: {error}") from error


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """How many lines have each status."""
    found: dict[str, int] = {}
    for line in lines:
        found[line.outcome.status] = found.get(line.outcome.status, 0) + 1
    return found
