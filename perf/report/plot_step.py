"""Time of a training step against how much of the table is read: dense or sparse gradients."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.records.sweep_row import POINT_FIELDS, Row

from .plot_style import BLUE, GREEN, ORANGE, add_caption, count_axis, new_figure, plain_log_axis
from .slices import describe, machine, reliability

_FREE = ("tokens", "pass_name", "sparse_grad", "reads")
_STYLE = {
    ("step", False): (ORANGE, "s", "dense gradient, torch.optim.Adam"),
    ("step", True): (GREEN, "^", "sparse gradient, SparseAdam"),
    ("fused-step", True): (BLUE, "o", "gradient kept as factors, SparseAdam"),
}


def reads_per_slot(row: Row) -> float:
    """T · R / K."""
    return row.tokens * row.heads * row.top_k / row.num_slots


def step_against_reads(rows: Sequence[Row]) -> Figure | None:
    """A step's time against reads a slot, with a panel for each kind of reads; None without data.

    Of the rows that differ in tokens, gradient and reads alone, the largest set is drawn.
    """
    sets: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.ok and row.steps and row.implementation == "pkm_triton":
            shared = (getattr(row, name) for name in POINT_FIELDS if name not in _FREE)
            sets.setdefault((*shared, *row.circumstances), []).append(row)
    found = max(sets.values(), key=lambda each: len({row.tokens for row in each}), default=[])
    ticks = sorted({reads_per_slot(row) for row in found})
    if len(ticks) < 3:
        return None
    kinds = sorted({row.reads for row in found})
    figure, axes = new_figure(len(kinds), width=5.0 * len(kinds))
    crossings: list[str] = []
    for axis, reads in zip(axes, kinds, strict=True):
        lines = {
            key: sorted(
                (r for r in found if (r.pass_name, r.sparse_grad) == key and r.reads == reads),
                key=reads_per_slot,
            )
            for key in _STYLE
        }
        for key, series in lines.items():
            colour, marker, label = _STYLE[key]
            places = [reads_per_slot(row) for row in series]
            times = [row.median_ms for row in series]
            axis.plot(places, times, color=colour, marker=marker, markersize=5, label=label)
            low, high = ([getattr(row, name) for row in series] for name in ("low_ms", "high_ms"))
            axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        plain_log_axis(axis, "x", ticks, [f"{tick:.3g}" for tick in ticks])
        count_axis(axis)
        axis.set_xlabel("reads a slot, T · R / K")
        axis.set_ylabel("time of a step, ms")
        axis.set_title(f"{reads} reads", fontsize=11)
        for key, name in ((("step", True), "sparse"), (("fused-step", True), "factors")):
            place = crossing(lines[key], lines[("step", False)])
            where = "nowhere" if place is None else f"above {place:.2g}"
            crossings.append(f"{reads}, {name}: {where}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    add_caption(
        figure,
        "Forward, backward and the optimiser's step of one layer: "
        f"{describe(found[0], 'tokens', 'reads')}. Median; bands from the 20th to the 80th "
        f"percentile. {machine(found[0])}. {reliability(found)}",
        f"Reads a slot at which a dense gradient is faster: {'; '.join(crossings)}.",
    )
    return figure


def crossing(series: Sequence[Row], other: Sequence[Row]) -> float | None:
    """The reads a slot from which on `other` is faster, between points as lines on log axes."""
    theirs = {row.tokens: row for row in other}
    ratios = [
        (math.log(reads_per_slot(row)), math.log(row.median_ms / theirs[row.tokens].median_ms))
        for row in series
        if row.tokens in theirs
    ]
    if not ratios or ratios[-1][1] <= 0:
        return None
    place = ratios[0][0]
    for (x, y), (next_x, next_y) in itertools.pairwise(ratios):
        if y <= 0 < next_y:  # the last such counts: before it `other` is slower again
            place = x - y * (next_x - x) / (next_y - y)
    return math.exp(place)
