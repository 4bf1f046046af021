"""Rows of several seeds as one figure with its spread, and what a study makes of them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.report.table import MISSING

from .presets import Preset
from .records import TimedRow, TrainedRow
from .trial import Trial


@dataclass(frozen=True)
class Report:
    """What a study has to show: sections of Markdown, and figures by file name."""

    sections: list[str]
    figures: dict[str, Figure]


class Study(Protocol):
    """A module of one study."""

    @property
    def TITLE(self) -> str:
        """What is studied, and which table or figure of the paper that is."""
        ...

    def trials(self, preset: Preset, base: Trial) -> list[Trial]:
        """What is trained, for one seed; `base` is the preset's, with the text and the seed."""
        ...

    def timed(self, preset: Preset, base: Trial) -> list[Trial]:
        """What is timed."""
        ...

    def report(self, results: "Results", preset: Preset, base: Trial) -> Report:
        """Tables and figures of what there is so far."""
        ...


@dataclass(frozen=True)
class Cell:
    """The rows of one trial over its seeds."""

    rows: Sequence[TrainedRow]

    def mean(self, name: str) -> float:
        """The mean of a figure over the seeds."""
        return sum(getattr(row, name) for row in self.rows) / len(self.rows)

    def ends(self, name: str) -> tuple[float, float]:
        """The lowest and the highest of a figure."""
        values = [getattr(row, name) for row in self.rows]
        return min(values), max(values)

    def text(self, name: str, spec: str, scale: float = 1.0) -> str:
        """The mean, and ± half the distance from lowest to highest where there are more seeds."""
        mean = self.mean(name) * scale
        if math.isnan(mean):
            return MISSING
        if len(self.rows) == 1:
            return format(mean, spec)
        low, high = self.ends(name)
        return f"{mean:{spec}} ±{(high - low) / 2 * scale:{spec}}"


@dataclass
class Results:
    """The rows of a study, found by trial.

    Args:
        trained: rows of any seeds.
        timed: rows of any device and call.
    """

    trained: Sequence[TrainedRow]
    timed: Sequence[TimedRow]
    _cells: dict[Trial, Cell] = field(init=False)

    def __post_init__(self) -> None:
        groups: dict[Trial, list[TrainedRow]] = {}
        for row in self.trained:
            groups.setdefault(dataclasses.replace(row.trial, seed=0), []).append(row)
        self._cells = {trial: Cell(rows) for trial, rows in groups.items()}

    def cell(self, trial: Trial) -> Cell | None:
        """The rows of a trial, whatever their seed."""
        return self._cells.get(dataclasses.replace(trial, seed=0))

    def speed(self, trial: Trial) -> TimedRow | None:
        """The last timing of a trial's architecture."""
        wanted = trial.architecture()
        found = [row for row in self.timed if row.trial == wanted]
        return found[-1] if found else None

    def of(self, trials: Iterable[Trial], timed: Iterable[Trial]) -> "Results":
        """The rows of these trials, whatever their seed, and timings of one call.

        Of the calls (device, threads, tokens) in which these models were timed it is the last.
        """
        wanted = {dataclasses.replace(trial, seed=0) for trial in trials}
        kept = [row for row in self.trained if dataclasses.replace(row.trial, seed=0) in wanted]
        models = {trial.architecture() for trial in timed}
        calls = [row.call for row in self.timed if row.trial in models]
        return Results(kept, [row for row in self.timed if row.call in calls[-1:]])

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most seeds of a trial."""
        counts = [len(cell.rows) for cell in self._cells.values()]
        return min(counts), max(counts)


def line(
    name: str,
    cells: Iterable[Cell | None],
    figure: str,
    spec: str,
    scale: float = 1.0,
) -> list[str]:
    """A line of a table: one figure of several trials."""
    return [name, *(MISSING if cell is None else cell.text(figure, spec, scale) for cell in cells)]


def speed_line(name: str, rows: Iterable[TimedRow | None]) -> list[str]:
    """A line of a table: tokens a second of several trials."""
    return [name, *(MISSING if row is None else f"{row.tokens_per_s:,.0f}" for row in rows)]


def published(name: str, values: Iterable[Any], spec: str, scale: float = 1.0) -> list[str]:
    """A line of the paper's figures."""
    return [name, *(MISSING if value is None else format(value * scale, spec) for value in values)]


def draw(
    axis: Axes,
    places: Sequence[float],
    cells: Sequence[Cell | None],
    name: str,
    *,
    scale: float = 1.0,
    **style: Any,
) -> None:
    """Draw the means of a figure over `places`, with a band from the lowest to the highest."""
    known = [(place, cell) for place, cell in zip(places, cells, strict=True) if cell is not None]
    if not known:
        return
    at = [place for place, _ in known]
    axis.plot(at, [cell.mean(name) * scale for _, cell in known], markersize=5, **style)
    ends = [cell.ends(name) for _, cell in known]
    axis.fill_between(
        at,
        [low * scale for low, _ in ends],
        [high * scale for _, high in ends],
        color=style["color"],
        alpha=0.2,
        linewidth=0,
    )


def describe(base: Trial, *varied: str) -> str:
    """The parameters that all trials of a table share, in words."""
    words = {
        "layers": f"{base.layers} layers of width {base.dim}",
        "context": f"context {base.context}",
        "memory_layers": f"memory at layer {base.memory_layers.replace('+', ' and ')}",
        "num_subkeys": f"|C| = {base.num_subkeys}",
        "heads": f"{base.heads} memory heads",
        "top_k": f"k {base.top_k}",
        "query_dim": f"d_q {base.query_dim}",
        "tokens": f"tokens: {base.tokens}",
        "steps": f"{base.steps:,} steps of {base.batch} sequences "
        f"({base.steps * base.batch * base.context / 1e6:.3g} M tokens)",
        "lr": f"learning rates {base.lr:g} and {base.value_lr:g} (values)",
    }
    return ", ".join(text for name, text in words.items() if name not in varied)


def about(results: Results, base: Trial, *varied: str) -> str:
    """The caption of a study: what is shared, the text, and the seeds."""
    if not results.trained:
        shared = describe(base, *varied, "steps", "lr")
        return f"{shared[0].upper()}{shared[1:]}. Only speed was measured."
    shared, (fewest, most) = describe(base, *varied), results.seeds
    parts = [f"{shared[0].upper()}{shared[1:]}."]
    if base.task == "text":
        parts.append(f"Text: {base.text}, {base.text_size / 1e6:.1f} MB.")
    range_of = "" if fewest == most else f"{fewest} to "
    parts.append(f"{range_of}{most} seed{'s' * (most > 1)} a point.")
    if most > 1:
        parts.append("Means; ± and bands: half the distance, and the span, from lowest to highest.")
    return " ".join(parts)
