"""Pictures of speed: against memory size, top-k and heads."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.sweep_row import Row

from . import paper
from .plot_style import (
    GREY,
    SERIES_STYLE,
    add_caption,
    count_axis,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import by_series, describe, machine, rows_along

_PAPER_STYLE = {"product": ("--", "product keys"), "flat": (":", "flat keys")}


def speed_against_size(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second, and slow-down, against the number of slots; None without data."""
    found = rows_along(rows, "num_subkeys", pass_name="forward", least=2)
    if not found:
        return None
    figure, (speed, slowdown) = new_figure(2)
    for key, series in by_series(found).items():
        colour, marker, label = SERIES_STYLE[key]
        slots = [row.num_slots for row in series]
        style = {"color": colour, "marker": marker, "markersize": 5, "label": label}
        speed.plot(slots, [row.tokens_per_s for row in series], **style)
        speed.fill_between(slots, *_band(series), color=colour, alpha=0.2, linewidth=0)
        if len(series) > 1:
            relative = [row.median_ms / series[0].median_ms for row in series]
            slowdown.plot(slots, relative, **style)
    _add_paper(speed, slowdown)
    sizes = sorted({row.num_subkeys for row in found} | set(paper.TABLE_4_NUM_SUBKEYS))
    for axis in (speed, slowdown):
        ticks = [size**2 for size in sizes]
        plain_log_axis(axis, "x", ticks, [slots_label(tick) for tick in ticks])
        axis.set_xlabel("memory size, slots")
        count_axis(axis)
    speed.set_ylabel("speed, tokens per second")
    slowdown.set_ylabel("time relative to the smallest memory")
    speed.set_title("Speed", fontsize=11)
    slowdown.set_title("Slow-down as the memory grows", fontsize=11)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    add_caption(
        figure,
        f"One layer, forward: {describe(found[0], 'num_subkeys')}. Median; bands from the 20th to "
        f"the 80th percentile. {machine(found[0])}.",
        "Grey: the paper's Table 4, a whole 6-layer language model on the authors' GPUs (words per "
        "second): compare the shape, not the height.",
    )
    return figure


def speed_against_top_k(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second against the slots read per head; None without data."""
    return _speed_along(rows, "top_k", "top-k, slots read per head")


def speed_against_heads(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second against the number of heads; None without data."""
    return _speed_along(rows, "heads", "heads")


def _speed_along(rows: Sequence[Row], axis: str, label: str) -> Figure | None:
    found = rows_along(rows, axis, pass_name="forward")
    if not found:
        return None
    figure, (speed,) = new_figure(1, width=6.4)
    for key, series in by_series(found).items():
        colour, marker, name = SERIES_STYLE[key]
        places = [getattr(row, axis) for row in series]
        rates = [row.tokens_per_s for row in series]
        speed.plot(places, rates, color=colour, marker=marker, markersize=5, label=name)
        speed.fill_between(places, *_band(series), color=colour, alpha=0.2, linewidth=0)
    ticks = sorted({getattr(row, axis) for row in found})
    plain_log_axis(speed, "x", ticks, [str(tick) for tick in ticks])
    count_axis(speed)
    speed.set_xlabel(label)
    speed.set_ylabel("speed, tokens per second")
    speed.legend(fontsize=8, frameon=False)
    add_caption(
        figure,
        f"One layer, forward: {describe(found[0], axis)}. Median; bands from the 20th to the 80th "
        f"percentile. {machine(found[0])}.",
    )
    return figure


def _band(series: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Speeds at the 80th and the 20th percentile of the time."""
    slow = [row.tokens / row.high_ms * 1e3 for row in series]
    fast = [row.tokens / row.low_ms * 1e3 for row in series]
    return slow, fast


def _add_paper(speed: Axes, slowdown: Axes) -> None:
    slots = [size**2 for size in paper.TABLE_4_NUM_SUBKEYS]
    for keys, words in paper.TABLE_4_WORDS_PER_S.items():
        line, name = _PAPER_STYLE[keys]
        style = {"color": GREY, "linestyle": line, "linewidth": 1.2}
        label = f"paper's Table 4, {name} (whole model, GPU)"
        speed.plot(slots, words, label=label, **style)
        slowdown.plot(slots, [words[0] / rate for rate in words], **style)
