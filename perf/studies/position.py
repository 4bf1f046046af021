"""Where in the model the memory lies: the paper's Table 3."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import BLUE, GREY, add_caption, new_figure
from pkm_triton.perf.report.table import markdown

from .presets import Preset
from .summary import Report, Results, about, draw, line, published
from .trial import Trial

TITLE = "Position of the memory (the paper's Table 3)"
_FIGURES = {"perplexity": (".2f", 1.0), "usage": (".1f", 100.0), "kl": (".2f", 1.0)}
_NAMES = {"perplexity": "perplexity", "usage": "usage (%)", "kl": "KL"}


def _positions(base: Trial) -> list[Trial]:
    return [
        dataclasses.replace(base, memory_layers=str(number)) for number in range(1, base.layers + 1)
    ]


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """A memory in each layer in turn, and no memory."""
    return [*_positions(base), base.without_memory()]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """Nothing: a memory takes the same time wherever it lies."""
    return []


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Table 3, and the same as a picture."""
    cells = [results.cell(trial) for trial in _positions(base)]
    if not any(cells):
        return Report([], {})
    numbers = [str(number) for number in range(1, base.layers + 1)]
    lines = [
        line(_NAMES[name], cells, name, spec, scale) for name, (spec, scale) in _FIGURES.items()
    ]
    ours = markdown(["position", *numbers], lines)
    lines = [
        published(_NAMES[name], paper.TABLE_3[name], spec if name == "kl" else ".1f", scale)
        for name, (spec, scale) in _FIGURES.items()
    ]
    theirs = markdown(["position", *(str(number) for number in range(1, 7))], lines)
    none = results.cell(base.without_memory())
    caption = about(results, base, "memory_layers")
    sections = [caption, ours]
    if none is not None:
        sections.append(f"Without a memory: perplexity {none.text('perplexity', '.2f')}.")
    return Report(
        [*sections, "The paper's own:", theirs],
        {"position": _figure(results, base, caption)},
    )


def _figure(results: Results, base: Trial, caption: str) -> Figure:
    figure, axes = new_figure(3, width=11, height=4.2)
    cells = [results.cell(trial) for trial in _positions(base)]
    places = list(range(1, base.layers + 1))
    for axis, (name, (_, scale)) in zip(axes, _FIGURES.items(), strict=True):
        draw(axis, places, cells, name, scale=scale, color=BLUE, marker="o", label="here")
        values = [value * scale for value in paper.TABLE_3[name]]
        style: dict[str, Any] = {"color": GREY, "linestyle": "--", "marker": "o", "markersize": 4}
        target = axis.twinx() if name == "perplexity" else axis
        target.plot(range(1, 7), values, label="the paper", **style)
        axis.set_xticks(sorted({*places, *range(1, 7)}))
        axis.set_xlabel("layer of the memory")
        axis.set_ylabel({"usage": "memory usage, %", "kl": "KL, nats"}.get(name, "perplexity"))
        if target is not axis:
            target.set_ylabel("perplexity, the paper", color=GREY)
            target.spines[["top"]].set_visible(False)
    none = results.cell(base.without_memory())
    if none is not None:
        axes[0].axhline(none.mean("perplexity"), color=BLUE, linestyle=":", label="here, no memory")
    axes[1].set_ylim(0, 105)
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    add_caption(figure, caption)
    return figure
