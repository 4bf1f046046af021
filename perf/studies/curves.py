"""Product keys against flat keys over the length of training, with keys trained and fixed."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import (
    BLUE,
    GREY,
    ORANGE,
    add_caption,
    add_legend,
    new_figure,
)
from pkm_triton.perf.report.plot_style import slots_label as label_of
from pkm_triton.perf.report.table import MISSING, markdown

from .presets import Preset
from .summary import Cell, Report, Results, about, draw, line, published
from .trial import Trial

TITLE = "Product keys against flat keys, the longer they are trained"
_FIGURES = {
    "perplexity": ("Test perplexity", ".2f", 1.0),
    "usage": ("Usage, %", ".1f", 100.0),
    "kl": ("KL, nats", ".2f", 1.0),
}
_COLOURS = {"product": BLUE, "flat": ORANGE}
_ABOVE = "Perplexity of flat keys above that of product keys, %"

_Cells = dict[Trial, list[Cell | None]]


def _kinds(preset: Preset, base: Trial) -> list[Trial]:
    """Both kinds of keys of each size; then with fixed keys, of the smallest size only."""
    trained = [
        dataclasses.replace(base, num_subkeys=size, keys=keys)
        for size in preset.curve_sizes
        for keys in ("product", "flat")
    ]
    smallest = min(preset.curve_sizes)
    fixed = [
        dataclasses.replace(trial, fixed_keys=True)
        for trial in trained
        if trial.num_subkeys == smallest
    ]
    return [*trained, *fixed]


def _over_time(preset: Preset, trial: Trial) -> list[Trial]:
    return [dataclasses.replace(trial, steps=steps) for steps in preset.curve_steps]


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Every kind at every number of steps; each goes on where the one before it ended."""
    return [each for kind in _kinds(preset, base) for each in _over_time(preset, kind)]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """Nothing: their speeds are those of `keys`."""
    return []


def _name(trial: Trial) -> str:
    fixed = ", fixed" if trial.fixed_keys else ""
    return f"{trial.keys} keys{fixed}, {label_of(trial.num_slots)} slots"


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """A table a figure, and the curves."""
    cells: _Cells = {
        kind: [results.cell(trial) for trial in _over_time(preset, kind)]
        for kind in _kinds(preset, base)
    }
    cells = {kind: row for kind, row in cells.items() if any(row)}
    if not cells:
        return Report([], {})
    tokens = [steps * base.batch * base.context / 1e6 for steps in preset.curve_steps]
    caption = about(results, base, "num_subkeys", "steps")
    sections = [caption]
    for name, (title, spec, scale) in _FIGURES.items():
        lines = [line(_name(kind), row, name, spec, scale) for kind, row in cells.items()]
        sections.append(markdown([title, *(f"{count:.3g} M tokens" for count in tokens)], lines))
    sections.append(_table_above(cells, tokens))
    lines = [
        published("flat keys", paper.TABLE_4_FLAT["perplexity"][:2], ".1f"),
        published("product keys", paper.TABLE_2["batch"]["perplexity"][:2], ".1f"),
    ]
    sizes = [label_of(size**2) for size in paper.TABLE_4_NUM_SUBKEYS[:2]]
    sections += [
        "The paper's own perplexities, at the end of its training:",
        markdown(["keys", *(f"{size} slots" for size in sizes)], lines),
    ]
    return Report([each for each in sections if each], {"curves": _figure(cells, tokens, caption)})


def _table_above(cells: _Cells, tokens: list[float]) -> str:
    lines = []
    for kind in cells:
        above = _above_product(cells, kind) if kind.keys == "flat" else []
        if any(above):
            texts = [
                ", ".join(f"{100 * part:+.1f}" for part in parts) or MISSING for parts in above
            ]
            lines.append([_name(kind), *texts])
    header = [f"{_ABOVE}, by seed", *(f"{count:.3g} M tokens" for count in tokens)]
    return markdown(header, lines) if lines else ""


def _above_product(cells: _Cells, flat: Trial) -> list[list[float]]:
    """By number of steps, of each seed: perplexity of flat keys above that of product keys."""
    product = cells.get(dataclasses.replace(flat, keys="product"))
    if product is None:
        return [[] for _ in cells[flat]]
    above: list[list[float]] = []
    for ours, theirs in zip(cells[flat], product, strict=True):
        others = {row.seed: row.perplexity for row in theirs.rows} if theirs else {}
        rows = [row for row in (ours.rows if ours else ()) if row.seed in others]
        rows.sort(key=lambda row: row.seed)
        above.append([row.perplexity / others[row.seed] - 1 for row in rows])
    return above


def _figure(cells: _Cells, tokens: list[float], caption: str) -> Figure:
    figure, axes = new_figure(2, width=10.5, height=8.2, rows=2)
    sizes = sorted({kind.num_subkeys for kind in cells})
    for kind, row in cells.items():
        style: dict[str, Any] = {
            "color": _COLOURS[kind.keys],
            "marker": "os^"[sizes.index(kind.num_subkeys)],
            "linestyle": ":" if kind.fixed_keys else "-",
            "label": _name(kind),
        }
        for axis, (name, (_, _, scale)) in zip(axes, _FIGURES.items(), strict=False):
            draw(axis, tokens, row, name, scale=scale, **style)
        if kind.keys == "flat":
            known = [
                (count, 100 * min(parts), 100 * sum(parts) / len(parts), 100 * max(parts))
                for count, parts in zip(tokens, _above_product(cells, kind), strict=True)
                if parts
            ]
            at, lowest, means, highest = zip(*known, strict=True) if known else ((),) * 4
            axes[3].plot(at, means, markersize=5, **style)
            axes[3].fill_between(at, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
    titles = [title for title, _, _ in _FIGURES.values()]
    titles.append(_ABOVE)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("tokens trained on, millions")
        axis.set_xlim(left=0)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(MaxNLocator(10))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_locator(NullLocator())
    axes[1].set_ylim(0, 105)
    axes[3].axhline(0, color=GREY, linewidth=1)
    add_legend(figure, axes)
    add_caption(figure, caption)
    return figure
