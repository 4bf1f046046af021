"""What all pictures share: colours, labels of memory sizes, captions, saving."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

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
    ("pkm_triton", "product"): (BLUE, "o", "product keys"),
    ("pkm_triton", "flat"): (ORANGE, "s", "flat keys"),
    ("textbook", "product"): (GREEN, "^", "product keys, textbook PyTorch"),
    ("textbook", "flat"): (PURPLE, "v", "flat keys, textbook PyTorch"),
    ("textbook-compiled", "product"): (SKY, "<", "product keys, textbook compiled"),
    ("textbook-compiled", "flat"): (GREY, "<", "flat keys, textbook compiled"),
    ("textbook-tuned", "product"): (SKY, ">", "product keys, textbook compiled and tuned"),
    ("textbook-tuned", "flat"): (GREY, ">", "flat keys, textbook compiled and tuned"),
    ("product-key-memory", "product"): (PURPLE, "D", "product keys, package product-key-memory"),
}
PART_COLOURS = {"query": SKY, "lookup": ORANGE, "gather": BLUE}


def slots_label(num_slots: int) -> str:
    """16384 -> `16k`: a memory size, as the paper writes it where it is one of the paper's."""
    label = paper.MEMORY_SIZE_LABELS.get(num_slots)
    return label or count_label(round(num_slots, -3) if num_slots > 1e3 else num_slots)


def count_label(value: float) -> str:
    """35800 -> `35.8k`: a rate with three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


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
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_label(value)))
    axis.yaxis.set_minor_locator(NullLocator())


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
