"""Heads and top-k: the paper's Figure 6, with the diagonals of equal heads · k."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    add_caption,
    new_figure,
    plain_log_axis,
)
from pkm_triton.perf.report.table import MISSING, markdown

from .presets import Preset
from .summary import Cell, Report, Results, about, draw
from .trial import Trial

TITLE = "Heads and top-k (the paper's Figure 6)"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
_MARKERS = "os^Dv"


def _at(base: Trial, heads: int, top_k: int) -> Trial:
    return dataclasses.replace(base, heads=heads, top_k=top_k)


def _pairs(preset: Preset) -> list[tuple[int, int]]:
    return [
        (heads, top_k)
        for heads in preset.heads
        for top_k in preset.top_ks
        if preset.least_reads <= heads * top_k <= preset.most_reads
    ]


def _one_softmax(preset: Preset, base: Trial) -> list[Trial]:
    """Pairs of the base's heads · k whose heads share one softmax, as one head has."""
    return [
        dataclasses.replace(_at(base, heads, top_k), softmax="all")
        for heads, top_k in _pairs(preset)
        if heads > 1 and heads * top_k == base.heads * base.top_k
    ]


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Every pair of heads and k; along one diagonal with one softmax, too."""
    return [*timed(preset, base), *_one_softmax(preset, base)]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """Every pair of heads and k."""
    return [_at(base, heads, top_k) for heads, top_k in _pairs(preset)]


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """The grids, the diagonals of equal heads · k, and Figure 6."""
    cells = {
        (heads, top_k): results.cell(_at(base, heads, top_k))
        for heads in preset.heads
        for top_k in preset.top_ks
    }
    if not any(cells.values()):
        return Report([], {})
    caption = about(results, base, "heads", "top_k")
    sections = [caption]
    for title, name, spec, scale in (
        ("usage (%)", "usage", ".1f", 100.0),
        ("perplexity", "perplexity", ".2f", 1.0),
        ("KL", "kl", ".2f", 1.0),
    ):
        lines = []
        for heads in preset.heads:
            found = [cells[heads, top_k] for top_k in preset.top_ks]
            texts = [MISSING if cell is None else cell.text(name, spec, scale) for cell in found]
            lines.append([f"{heads} head{'s' * (heads > 1)}", *texts])
        header = [title, *(f"k {top_k}" for top_k in preset.top_ks)]
        sections.append(markdown(header, lines))
    sections.append(_speeds(results, preset, base))
    sections += ["Equal heads · k:", _diagonals(cells), _softmaxes(results, preset, base)]
    pairs = ", ".join(map(str, paper.FIGURE_6_EQUAL["pairs"]))
    sections.append(
        f"The paper's own, of (heads, k) in {pairs}: usage around "
        f"{paper.FIGURE_6_EQUAL['usage']:.0%}, perplexity around "
        f"{paper.FIGURE_6_EQUAL['perplexity']}."
    )
    figure = _figure(cells, preset, caption)
    return Report([each for each in sections if each], {"heads_topk": figure})


def _speeds(results: Results, preset: Preset, base: Trial) -> str:
    lines = []
    for heads in preset.heads:
        rows = [results.speed(_at(base, heads, top_k)) for top_k in preset.top_ks]
        texts = [MISSING if row is None else f"{row.tokens_per_s:,.0f}" for row in rows]
        lines.append([f"{heads} head{'s' * (heads > 1)}", *texts])
    if all(text == MISSING for texts in lines for text in texts[1:]):
        return ""
    return markdown(["tokens/s", *(f"k {top_k}" for top_k in preset.top_ks)], lines)


def _softmaxes(results: Results, preset: Preset, base: Trial) -> str:
    """Perplexity with a softmax a head, and with one over the reads of all heads."""
    lines = []
    for shared in _one_softmax(preset, base):
        own, one = results.cell(dataclasses.replace(shared, softmax="head")), results.cell(shared)
        if own is not None and one is not None:
            texts = [cell.text("perplexity", ".2f") for cell in (own, one)]
            lines.append([f"{shared.heads}, {shared.top_k}", *texts])
    if not lines:
        return ""
    return markdown(["heads, k", "perplexity, a softmax a head", "one softmax over all"], lines)


def _diagonals(cells: dict[tuple[int, int], Cell | None]) -> str:
    products = sorted({heads * top_k for heads, top_k in cells})
    lines = []
    for product in products:
        found = [
            (heads, top_k, cell)
            for (heads, top_k), cell in sorted(cells.items())
            if heads * top_k == product and cell is not None
        ]
        if len(found) < 2:
            continue
        usages = [cell.mean("usage") for *_, cell in found]
        perplexities = [cell.mean("perplexity") for *_, cell in found]
        lines.append(
            [
                str(product),
                ", ".join(f"({heads}, {top_k})" for heads, top_k, _ in found),
                f"{min(usages):.1%} to {max(usages):.1%}",
                f"{min(perplexities):.2f} to {max(perplexities):.2f}",
            ]
        )
    return markdown(["heads · k", "(heads, k)", "usage", "perplexity"], lines)


def _figure(cells: dict[tuple[int, int], Cell | None], preset: Preset, caption: str) -> Figure:
    figure, axes = new_figure(3, width=13, height=4.8)
    for place, heads in enumerate(preset.heads):
        style: dict[str, Any] = {"color": _COLOURS[place % 5], "marker": _MARKERS[place % 5]}
        label = f"{heads} head{'s' * (heads > 1)}"
        row = [cells[heads, top_k] for top_k in preset.top_ks]
        draw(axes[0], preset.top_ks, row, "usage", scale=100, label=label, **style)
        draw(axes[1], preset.top_ks, row, "perplexity", label=label, **style)
        reads = [heads * top_k for top_k in preset.top_ks]
        draw(axes[2], reads, row, "usage", scale=100, label=label, **style)
    for axis in axes[:2]:
        plain_log_axis(axis, "x", preset.top_ks, [str(top_k) for top_k in preset.top_ks])
        axis.set_xlabel("k, slots read a head")
    products = sorted({heads * top_k for heads, top_k in cells})
    plain_log_axis(axes[2], "x", products, [str(product) for product in products])
    axes[2].set_xlabel("heads · k, slots read a token")
    for axis in (axes[0], axes[2]):
        axis.set_ylabel("memory usage, %")
    axes[1].set_ylabel("test perplexity")
    axes[0].set_title("Usage", fontsize=11)
    axes[1].set_title("Perplexity", fontsize=11)
    axes[2].set_title("Usage against heads · k", fontsize=11)
    axes[0].legend(fontsize=8, frameon=False)
    add_caption(figure, caption)
    return figure
