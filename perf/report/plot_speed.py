"""Pictures of speed along one axis of the grid: memory size, top-k, heads, widths, dtypes, ..."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.points import IMPLEMENTATIONS, PASSES
from pkm_triton.perf.records.sweep_row import Row

from . import paper
from .plot_style import (
    GREY,
    SERIES_STYLE,
    add_caption,
    add_legend,
    count_axis,
    count_label,
    label_bars,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import by_series, gradient, reliability, rows_along, shared

NUMERIC = {
    "top_k": "top-k, slots read per head",
    "heads": "heads",
    "tokens": "tokens in one call",
    "dim": "width of a token and of a value",
    "value_dim": "width of a value",
    "query_dim": "width of one head's query",
    "threads": "CPU threads",
}
OURS = IMPLEMENTATIONS[0]
NAMED = ("dtype", "query_norm", "reads", "sparse_grad")
_PAPER_STYLE = {"product": ("--", "product keys"), "flat": (":", "flat keys")}


def speed_against_size(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second, and slow-down, against the number of slots; a row of panels a pass."""
    shown = _by_pass(rows, "num_subkeys")
    if not shown:
        return None
    figure, axes = new_figure(2, height=0.8 + 3.8 * len(shown), rows=len(shown))
    for number, (title, found) in enumerate(shown.items()):
        speed, slowdown = axes[2 * number : 2 * number + 2]
        sizes = {row.num_subkeys for row in found if row.ok}
        for key, series in by_series(found).items():
            slots = [row.num_slots for row in series]
            _line(speed, slots, series, key)
            if len(series) > 1:
                colour, marker, _ = SERIES_STYLE[key]
                relative = [row.median_ms / series[0].median_ms for row in series]
                slowdown.plot(slots, relative, color=colour, marker=marker, markersize=5)
        if found[0].pass_name == "forward" and sizes & set(paper.TABLE_4_NUM_SUBKEYS):
            _add_paper(speed, slowdown)
        _mark_launches(speed, found, "num_slots")
        for axis in (speed, slowdown):
            ticks = [size**2 for size in sorted(sizes)]
            plain_log_axis(axis, "x", ticks, [slots_label(tick) for tick in ticks])
            axis.set_xlabel("memory size, slots")
            count_axis(axis)
        speed.set_ylabel("speed, tokens per second")
        slowdown.set_ylabel("time relative to the smallest memory")
        speed.set_title(f"Speed: {title}", fontsize=11)
        slowdown.set_title(f"Slow-down: {title}", fontsize=11)
    add_legend(figure, axes)
    paper_note = (
        "Grey: the paper's Table 4, a whole 6-layer language model on the authors' GPUs (words per "
        "second): compare the shape, not the height."
    )
    _caption(figure, shown, "num_subkeys", *([paper_note] if "forward" in shown else []))
    return figure


def speed_along(rows: Sequence[Row], axis: str) -> Figure | None:
    """Tokens per second against a field of `Point`, a panel a pass; None where it does not vary."""
    shown = _by_pass(rows, axis)
    if not shown:
        return None
    figure, axes = new_figure(len(shown), width=max(6.4, 5.0 * len(shown)))
    for panel, (title, found) in zip(axes, shown.items(), strict=True):
        if axis in NUMERIC:
            for key, series in by_series(found).items():
                _line(panel, [getattr(row, axis) for row in series], series, key)
            ticks = sorted({getattr(row, axis) for row in found if row.ok})
            plain_log_axis(panel, "x", ticks, [str(tick) for tick in ticks])
            panel.set_xlabel(NUMERIC[axis])
            _mark_launches(panel, found, axis)
            count_axis(panel)
        else:
            _bars(panel, found, axis)
        panel.set_ylabel("speed, tokens per second")
        panel.set_title(title[0].upper() + title[1:], fontsize=11)
    add_legend(figure, axes)
    _caption(figure, shown, axis)
    return figure


def _by_pass(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """For each pass the rows that go along the axis, by what the panel is called."""
    found = {name: rows_along(rows, axis, pass_name=name) for name in PASSES}
    return {
        f"{name}{'' if axis == 'sparse_grad' else gradient(each[0])}": each
        for name, each in found.items()
        if each
    }


def _line(axis: Axes, places: Sequence[float], series: Sequence[Row], key: tuple[str, str]) -> None:
    colour, marker, label = SERIES_STYLE[key]
    rates = [row.tokens_per_s for row in series]
    axis.plot(places, rates, color=colour, marker=marker, markersize=5, label=label)
    slow = [row.tokens_per_s * row.median_ms / row.high_ms for row in series]
    fast = [row.tokens_per_s * row.median_ms / row.low_ms for row in series]
    axis.fill_between(places, slow, fast, color=colour, alpha=0.2, linewidth=0)


def _bars(axis: Axes, found: Sequence[Row], field: str) -> None:
    values = list(dict.fromkeys(str(getattr(row, field)) for row in found if row.ok))
    series = by_series(found)
    width = 0.8 / len(series)
    for lane, (key, rows) in enumerate(series.items()):
        colour, _, label = SERIES_STYLE[key]
        speeds = {str(getattr(row, field)): row.tokens_per_s for row in rows}
        places = [place + (lane - (len(series) - 1) / 2) * width for place in range(len(values))]
        heights = [speeds.get(value, 0.0) for value in values]
        bars = axis.bar(places, heights, width=width, color=colour, label=label)
        label_bars(axis, bars, [count_label(height) if height else "" for height in heights])
    axis.set_xticks(range(len(values)), values)
    axis.set_xlabel(field.replace("_", " "))
    axis.set_ylim(bottom=0)
    axis.grid(False, axis="x")


def _mark_launches(axis: Axes, found: Sequence[Row], field: str) -> None:
    """On a GPU: the speed that the CPU time of the launches allows, however quick the kernels."""
    speeds: dict[int, list[float]] = {}
    for row in found:
        if row.ok and row.device == "cuda" and row.cpu_ms > 0 and row.implementation == OURS:
            allowed = row.tokens_per_s * row.median_ms / row.cpu_ms
            speeds.setdefault(getattr(row, field), []).append(allowed)
    if speeds:
        places = sorted(speeds)
        axis.plot(
            places,
            [max(speeds[place]) for place in places],
            color=GREY,
            linewidth=1,
            linestyle="-.",
            label="what launching the kernels allows",
        )


def _add_paper(speed: Axes, slowdown: Axes) -> None:
    slots = [size**2 for size in paper.TABLE_4_NUM_SUBKEYS]
    for keys, words in paper.TABLE_4_WORDS_PER_S.items():
        line, name = _PAPER_STYLE[keys]
        label = f"paper's Table 4, {name} (whole model, GPU)"
        speed.plot(slots, words, label=label, color=GREY, linestyle=line, linewidth=1.2)
        relative = [words[0] / rate for rate in words]
        slowdown.plot(slots, relative, color=GREY, linestyle=line, linewidth=1.2)


def _caption(figure: Figure, shown: Mapping[str, Sequence[Row]], axis: str, *notes: str) -> None:
    add_caption(
        figure,
        f"One layer. {shared(shown, axis)} Median; bands from the 20th to the 80th percentile. "
        f"{reliability(row for found in shown.values() for row in found)}",
        *notes,
    )
