"""Product keys against flat keys: the paper's Table 4."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import (
    BLUE,
    ORANGE,
    add_caption,
    count_axis,
    new_figure,
    plain_log_axis,
)
from pkm_triton.perf.report.plot_style import slots_label as label_of
from pkm_triton.perf.report.table import markdown

from .presets import Preset
from .summary import Report, Results, about, draw, line, published, speed_line
from .trial import Trial

TITLE = "Product keys against flat keys (the paper's Table 4)"
_STYLE: dict[str, dict[str, Any]] = {
    "flat": {"color": ORANGE, "marker": "s"},
    "product": {"color": BLUE, "marker": "o"},
}
_FIGURES = {"perplexity": (".2f", 1.0), "usage": (".1f", 100.0), "kl": (".2f", 1.0)}
_NAMES = {"perplexity": "perplexity", "usage": "usage (%)", "kl": "KL"}


def _sized(base: Trial, size: int, keys: str) -> Trial:
    return dataclasses.replace(base, num_subkeys=size, keys=keys)


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Product keys of all sizes, flat keys of those that can be trained."""
    product = [_sized(base, size, "product") for size in preset.sizes]
    return [*product, *(_sized(base, size, "flat") for size in preset.flat_sizes)]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """Both kinds of all sizes."""
    return [_sized(base, size, keys) for size in preset.sizes for keys in ("product", "flat")]


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Table 4, and the same as a picture."""
    cells = {
        keys: [results.cell(_sized(base, size, keys)) for size in preset.sizes] for keys in _STYLE
    }
    if not any(cell for row in cells.values() for cell in row):
        return Report([], {})
    lines = [["\\|C\\|", *map(str, preset.sizes)]]
    for name, (spec, scale) in _FIGURES.items():
        for keys in _STYLE:
            lines.append(line(f"{_NAMES[name]}, {keys}", cells[keys], name, spec, scale))
    for keys in _STYLE:
        rates = [results.speed(_sized(base, size, keys)) for size in preset.sizes]
        lines.append(speed_line(f"tokens/s at inference, {keys}", rates))
    ours = markdown(["memory size", *(label_of(size**2) for size in preset.sizes)], lines)
    lines = [["\\|C\\|", *map(str, paper.TABLE_4_NUM_SUBKEYS)]]
    for name, (spec, scale) in _FIGURES.items():
        spec = ".1f" if name == "perplexity" else spec
        flat = (*paper.TABLE_4_FLAT[name], None, None, None)
        lines.append(published(f"{_NAMES[name]}, flat", flat, spec, scale))
        product = paper.TABLE_2["batch"][name]
        lines.append(published(f"{_NAMES[name]}, product", product, spec, scale))
    for keys in _STYLE:
        words = paper.TABLE_4_WORDS_PER_S[keys]
        lines.append(published(f"words/s at inference, {keys}", words, ",.0f"))
    theirs = markdown(
        ["memory size", *(label_of(size**2) for size in paper.TABLE_4_NUM_SUBKEYS)], lines
    )
    caption = about(results, base, "num_subkeys")
    return Report(
        [caption, ours, "The paper's own:", theirs],
        {"keys": _figure(results, preset, base, caption)},
    )


def _figure(results: Results, preset: Preset, base: Trial, caption: str) -> Figure:
    figure, axes = new_figure(2, width=9.5, height=7.6, rows=2)
    slots = [size**2 for size in preset.sizes]
    for keys, style in _STYLE.items():
        cells = [results.cell(_sized(base, size, keys)) for size in preset.sizes]
        label = f"{keys} keys"
        draw(axes[0], slots, cells, "usage", scale=100, label=label, **style)
        draw(axes[1], slots, cells, "perplexity", label=label, **style)
        draw(axes[2], slots, cells, "kl", label=label, **style)
        rates = [results.speed(_sized(base, size, keys)) for size in preset.sizes]
        known = [(at, row) for at, row in zip(slots, rates, strict=True) if row is not None]
        if known:
            places, speeds = [at for at, _ in known], [row.tokens_per_s for _, row in known]
            axes[3].plot(places, speeds, markersize=5, label=label, **style)
    titles = ("Usage, %", "Test perplexity", "KL, nats", "Tokens per second at inference")
    for axis, title in zip(axes, titles, strict=True):
        plain_log_axis(axis, "x", slots, [label_of(tick) for tick in slots])
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("memory size, slots")
    axes[0].set_ylim(0, 105)
    if any(line.get_label() for line in axes[3].get_lines()):
        count_axis(axes[3])
    axes[0].legend(fontsize=8, frameon=False)
    add_caption(figure, caption)
    return figure
