"""Where the time goes: query, lookup and gather against the size of the codebooks."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.sweep_row import Row

from .plot_style import PART_COLOURS, add_caption, new_figure, number
from .slices import by_series, describe, machine, reliability, rows_along

_TITLES = {"product": "Product keys", "flat": "Flat keys"}


def time_by_part(rows: Sequence[Row]) -> Figure | None:
    """Stacked bars of the three parts for product and flat keys; None without data."""
    timed = [
        row for row in rows if row.implementation == "pkm_triton" and not math.isnan(row.lookup_ms)
    ]
    found = rows_along(timed, "num_subkeys", pass_name="forward", least=2)
    shown = {keys: series for (_, keys), series in by_series(found).items()}
    if not shown:
        return None
    figure, axes = new_figure(len(shown), width=5.0 * len(shown))
    for axis, (keys, series) in zip(axes, shown.items(), strict=True):
        _stack(axis, series)
        axis.set_title(_TITLES[keys], fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    add_caption(
        figure,
        f"One layer of pkm_triton, forward, each part timed on its own: "
        f"{describe(found[0], 'num_subkeys')}. "
        f"{machine(found[0])}. The panels differ in scale. {reliability(found)}",
    )
    return figure


def _stack(axis: Axes, series: Sequence[Row]) -> None:
    places = list(range(len(series)))
    in_seconds = max(row.median_ms for row in series) > 2000
    scale, unit = (1e-3, "s") if in_seconds else (1.0, "ms")
    floor = [0.0] * len(series)
    for part, colour in PART_COLOURS.items():
        heights = [getattr(row, f"{part}_ms") * scale for row in series]
        axis.bar(places, heights, bottom=floor, color=colour, label=part, width=0.7)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    for place, top in zip(places, floor, strict=True):
        axis.annotate(
            number(top),
            (place, top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.set_xticks(places, [str(row.num_subkeys) for row in series])
    axis.set_xlabel("sub-keys per codebook, |C|")
    axis.set_ylabel(f"time of a pass, {unit}")
    axis.grid(False, axis="x")
