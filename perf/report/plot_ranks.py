"""Speed of a memory over ranks, and what they send: by formula, and counted."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.points import PASSES
from pkm_triton.perf.records.sweep_row import POINT_FIELDS, Row

from .plot_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    add_caption,
    add_legend,
    count_axis,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import gradient, reliability, shared

_FREE = ("num_subkeys", "ranks", "layout")
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY)
_LINES = {"none": "-", "columns": "--", "rows": ":"}
_MARKERS = {"columns": "o", "rows": "s"}


def speed_over_ranks(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second of all ranks against slots, a panel a pass, and bytes that a rank sends.

    None where no memory lies over ranks. Of rows that differ in slots, ranks and layout alone, the
    set with most is drawn.
    """
    shown = [found for name in PASSES if (found := _largest_set(rows, name))]
    if not shown:
        return None
    counts = sorted({row.ranks for found in shown for row in found})
    figure, axes = new_figure(len(shown) + 1, width=4.6 * (len(shown) + 1))
    for axis, found in zip(axes, shown, strict=False):
        for number, count in enumerate(counts):
            for layout, line in _LINES.items():
                _draw_speed(axis, found, (count, layout), (_COLOURS[number % 6], line))
        ticks = sorted({row.num_slots for row in found})
        plain_log_axis(axis, "x", ticks, [slots_label(tick) for tick in ticks])
        axis.set_xlabel("memory size, slots")
        count_axis(axis)
        axis.set_ylabel("speed of all ranks, tokens per second")
        axis.set_title(f"{found[0].pass_name}{gradient(found[0])}", fontsize=11)
    sent = axes[-1]
    for number, found in enumerate(shown):
        _draw_sent(sent, found, _COLOURS[number % 6])
    sent.set_xticks([count for count in counts if count > 1])
    sent.set_xlabel("ranks")
    sent.set_ylabel("sent by a rank, KiB a token of its own")
    sent.set_ylim(bottom=0)
    sent.set_title("Traffic: lines by formula, marks counted", fontsize=11)
    add_legend(figure, axes)
    passes = {found[0].pass_name: found for found in shown}
    add_caption(
        figure,
        f"One layer, each rank with tokens of its own. {shared(passes, *_FREE)} Median of the "
        "first rank; bands from the 20th to the 80th percentile. Bytes of all table sizes. "
        f"{reliability([row for found in shown for row in found])}",
    )
    return figure


def _largest_set(rows: Sequence[Row], pass_name: str) -> list[Row]:
    sets: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.ok and row.pass_name == pass_name and row.implementation == "pkm_triton":
            shared = (getattr(row, name) for name in POINT_FIELDS if name not in _FREE)
            sets.setdefault((*shared, *row.circumstances), []).append(row)
    over = [found for found in sets.values() if any(row.ranks > 1 for row in found)]
    return sorted(max(over, key=len, default=[]), key=lambda row: row.num_slots)


def _draw_speed(
    axis: Axes, found: Sequence[Row], which: tuple[int, str], style: tuple[str, str]
) -> None:
    series = [row for row in found if (row.ranks, row.layout) == which]
    if not series:
        return
    (count, layout), (colour, line) = which, style
    places = [row.num_slots for row in series]
    label = "1 rank" if count == 1 else f"{count} ranks, {layout}"
    speeds = [row.tokens_per_s for row in series]
    axis.plot(places, speeds, color=colour, linestyle=line, marker="o", markersize=4, label=label)
    low, high = (
        [row.ranks * row.tokens / getattr(row, name) * 1e3 for row in series]
        for name in ("high_ms", "low_ms")
    )
    axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


def _draw_sent(axis: Axes, found: Sequence[Row], colour: str) -> None:
    """What grows with ranks, and not with slots: all table sizes lie on one line."""
    for layout, marker in _MARKERS.items():
        series = sorted((row for row in found if row.layout == layout), key=lambda row: row.ranks)
        if not series:
            continue
        places = [row.ranks for row in series]
        told, counted = (
            [getattr(row, name) / row.tokens / 1024 for row in series]
            for name in ("sent_bytes", "counted_bytes")
        )
        axis.plot(places, told, color=colour, linestyle=_LINES[layout], linewidth=1)
        label = f"{series[0].pass_name}, {layout}"
        axis.plot(places, counted, marker, color=colour, fillstyle="none", label=label)
