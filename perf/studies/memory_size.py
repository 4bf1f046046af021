"""Memory size, with and without batch norm on the query: the paper's Table 2 and Figure 5."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import (
    BLUE,
    GREY,
    ORANGE,
    add_caption,
    new_figure,
    plain_log_axis,
    slots_label,
)
from pkm_triton.perf.report.table import MISSING, markdown

from .presets import Preset
from .summary import Report, Results, about, draw, line, published
from .trial import Trial

TITLE = "Memory size and batch norm (the paper's Table 2 and Figure 5)"
_NORMS = {"none": "no batch norm", "batch": "batch norm"}
_STYLE: dict[str, dict[str, Any]] = {
    "none": {"color": ORANGE, "marker": "s"},
    "batch": {"color": BLUE, "marker": "o"},
}
_FIGURES = {"perplexity": (".2f", 1.0), "usage": (".1f", 100.0), "kl": (".2f", 1.0)}
_NAMES = {"perplexity": "perplexity", "usage": "usage (%)", "kl": "KL"}


def _sized(base: Trial, size: int, norm: str) -> Trial:
    return dataclasses.replace(base, num_subkeys=size, query_norm=norm)


def _without(base: Trial, preset: Preset) -> dict[str, Trial]:
    """The same model without a memory, and deeper ones."""
    none = base.without_memory()
    depths = [base.layers, *(base.layers + more for more in preset.deeper)]
    return {
        f"no memory, {layers} layers": dataclasses.replace(none, layers=layers) for layers in depths
    }


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Every size with and without batch norm, and the models without a memory."""
    sized = [_sized(base, size, norm) for size in preset.sizes for norm in _NORMS]
    return [*_without(base, preset).values(), *sized]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """The models without a memory, and the sizes with batch norm."""
    sized = [_sized(base, size, "batch") for size in preset.sizes]
    return [*_without(base, preset).values(), *sized]


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Table 2 and Figure 5, and perplexity beside speed."""
    caption = about(results, base, "num_subkeys")
    ours, speeds = _table(results, preset, base), _speeds(results, preset, base)
    if not ours and not speeds:
        return Report([], {})
    note = f"The paper's own; without a memory its model has {paper.NO_MEMORY_PERPLEXITY}:"
    sections = [each for each in (caption, ours, speeds, note, _published()) if each]
    figures = {"memory_size": _figure(results, preset, base, caption)} if ours else {}
    return Report(sections, figures)


def _table(results: Results, preset: Preset, base: Trial) -> str:
    cells = {
        norm: [results.cell(_sized(base, size, norm)) for size in preset.sizes] for norm in _NORMS
    }
    if not any(cell for row in cells.values() for cell in row):
        return ""
    lines = [["\\|C\\|", *map(str, preset.sizes)]]
    for name, (spec, scale) in _FIGURES.items():
        for norm, words in _NORMS.items():
            lines.append(line(f"{_NAMES[name]}, {words}", cells[norm], name, spec, scale))
    lines.append(line("bits per byte, batch norm", cells["batch"], "bits_per_byte", ".4f"))
    reads = [cell.mean("reads_per_slot") if cell else None for cell in cells["batch"]]
    lines.append(published("reads of the test set a slot", reads, ",.0f"))
    return markdown(["memory size", *(slots_label(size**2) for size in preset.sizes)], lines)


def _speeds(results: Results, preset: Preset, base: Trial) -> str:
    models = _without(base, preset)
    for size in preset.sizes:
        models[f"memory of {slots_label(size**2)}, batch norm"] = _sized(base, size, "batch")
    lines = []
    for name, trial in models.items():
        cell, rate = results.cell(trial), results.speed(trial)
        perplexity = cell.text("perplexity", ".2f") if cell else MISSING
        lines.append([name, perplexity, f"{rate.tokens_per_s:,.0f}" if rate else MISSING])
    if all(text == MISSING for texts in lines for text in texts[1:]):
        return ""
    return markdown(["model", "perplexity", "tokens/s at inference"], lines)


def _published() -> str:
    lines = [["\\|C\\|", *map(str, paper.TABLE_2_NUM_SUBKEYS)]]
    for name, (spec, scale) in _FIGURES.items():
        spec = ".1f" if name == "perplexity" else spec
        for norm, words in _NORMS.items():
            values = paper.TABLE_2[norm][name]
            lines.append(published(f"{_NAMES[name]}, {words}", values, spec, scale))
    words = paper.TABLE_4_WORDS_PER_S["product"]
    lines.append(published("words/s at inference, batch norm", words, ",.0f"))
    sizes = [slots_label(size**2) for size in paper.TABLE_2_NUM_SUBKEYS]
    return markdown(["memory size", *sizes], lines)


def _figure(results: Results, preset: Preset, base: Trial, caption: str) -> Figure:
    figure, axes = new_figure(2, width=9.5, height=7.6, rows=2)
    slots = [size**2 for size in preset.sizes]
    theirs = [size**2 for size in paper.TABLE_2_NUM_SUBKEYS]
    for column, name in enumerate(("usage", "perplexity")):
        scale = _FIGURES[name][1]
        for norm, words in _NORMS.items():
            cells = [results.cell(_sized(base, size, norm)) for size in preset.sizes]
            draw(axes[column], slots, cells, name, scale=scale, label=words, **_STYLE[norm])
            values = [value * scale for value in paper.TABLE_2[norm][name]]
            axes[2 + column].plot(theirs, values, markersize=5, label=words, **_STYLE[norm])
        for axis, ticks in ((axes[column], slots), (axes[2 + column], theirs)):
            plain_log_axis(axis, "x", ticks, [slots_label(tick) for tick in ticks])
            axis.set_ylabel("memory usage, %" if name == "usage" else "test perplexity")
            axis.set_xlabel("memory size, slots")
            if name == "usage":
                axis.set_ylim(0, 105)
    none = results.cell(base.without_memory())
    if none is not None:
        style = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": "no memory"}
        axes[1].axhline(none.mean("perplexity"), **style)
        axes[3].axhline(paper.NO_MEMORY_PERPLEXITY, **style)
    axes[0].set_title("Usage, here", fontsize=11)
    axes[1].set_title("Perplexity, here", fontsize=11)
    axes[2].set_title("Usage, the paper's Figure 5", fontsize=11)
    axes[3].set_title("Perplexity, the paper's Figure 5", fontsize=11)
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
    add_caption(figure, caption)
    return figure
