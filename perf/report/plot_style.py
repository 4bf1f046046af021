"""What all pictures share: colours, labels of memory sizes, captions, saving."""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from pkm_triton.perf.records.files import write_whole

from . import paper

# Okabe and Ito's palette, made for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#6E6E6E",
)
SERIES_STYLE = {
    ("pkm_triton", "product"): (BLUE, "o", "pkm_triton, product keys"),
    ("pkm_triton", "flat"): (ORANGE, "s", "pkm_triton, flat keys"),
    ("textbook", "product"): (GREEN, "^", "textbook PyTorch, product keys"),
    ("textbook", "flat"): (PURPLE, "v", "textbook PyTorch, flat keys"),
    ("textbook-compiled", "product"): (SKY, "<", "textbook compiled, product keys"),
    ("textbook-compiled", "flat"): (GREY, "<", "textbook compiled, flat keys"),
    ("textbook-tuned", "product"): (SKY, ">", "textbook compiled and tuned, product keys"),
    ("textbook-tuned", "flat"): (GREY, ">", "textbook compiled and tuned, flat keys"),
    ("product-key-memory", "product"): (PURPLE, "D", "package product-key-memory"),
}
PART_COLOURS = {"query": SKY, "lookup": ORANGE, "gather": BLUE}


def slots_label(num_slots: int) -> str:
    """16384 -> `16k`: a memory size, as the paper writes it where it is one of the paper's."""
    label = paper.MEMORY_SIZE_LABELS.get(num_slots)
    return label or count_label(round(num_slots, -3) if num_slots > 1e3 else num_slots)


def count_label(value: float) -> str:
    """35800 -> `35.8k`: a rate with three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{value:.3g}") >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def number(value: float) -> str:
    """A figure with three digits, or whole where it has more, and never with an exponent."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{digits}f}"


def plain_log_axis(axis: Axes, which: str, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """Make an axis logarithmic with just these ticks."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_locator(FixedLocator(ticks))
    target.set_ticklabels(labels)
    target.set_minor_locator(NullLocator())
    target.set_minor_formatter(NullFormatter())


def count_axis(axis: Axes) -> None:
    """A logarithmic y axis with labels as 2k, 5k, 10k."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(_EnoughTicks())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_label(value)))
    axis.yaxis.set_minor_locator(NullLocator())


class _EnoughTicks(Locator):
    """At least four ticks: powers of ten, or their halves and fifths, or an even spacing."""

    def __call__(self) -> Any:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Ticks between the two."""
        for subs in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            ticks = [t for t in LogLocator(subs=subs).tick_values(vmin, vmax) if vmin <= t <= vmax]
            if len(ticks) >= 4:
                return ticks
        return [t for t in MaxNLocator(5).tick_values(vmin, vmax) if vmin <= t <= vmax]


def label_bars(axis: Axes, bars: BarContainer, labels: Sequence[str]) -> None:
    """Write labels at the ends of bars, above whatever line runs there."""
    for text in axis.bar_label(bars, labels, padding=2, fontsize=7):
        text.set(path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5)


def add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of all panels, which need not show the same series, as wide as fits."""
    found = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    canvas: Any = figure.canvas
    for columns in (3, 2, 1):
        legend = figure.legend(
            handles=list(found.values()),
            labels=list(found),
            loc="outside upper center",
            ncols=columns,
            fontsize=8,
            frameon=False,
        )
        if legend.get_window_extent(canvas.get_renderer()).width <= figure.bbox.width:
            return
        if columns > 1:
            legend.remove()


def new_figure(
    panels: int, width: float = 10.0, height: float = 4.6, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with rows of panels side by side, drawn without a window; axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, panels, squeeze=False).flat)
    for axis in axes:
        axis.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_caption(figure: Figure, *lines: str) -> None:
    """Small print below the panels."""
    width = int(figure.get_figwidth() * 15)
    text = "\n".join("\n".join(textwrap.wrap(line, width)) for line in lines)
    figure.supxlabel(text, fontsize=7.5, color="#444444", x=0.01, ha="left")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, each whole or not at all."""
    paths = []
    for suffix in (".png", ".svg"):
        path = stem.with_suffix(suffix)
        content = io.BytesIO()
        # No dates and fixed ids: the same rows make the same file.
        with mpl.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "path"}):
            figure.savefig(
                content,
                format=suffix[1:],
                dpi=150,
                metadata={"Date": None} if suffix == ".svg" else None,
            )
        write_whole(path, content.getvalue())
        paths.append(path)
    return paths
