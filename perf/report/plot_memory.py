"""Peak memory of a pass, along each axis that varies."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.sweep_row import Row

from .plot_style import (
    SERIES_STYLE,
    add_caption,
    add_legend,
    count_axis,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import by_series, gradient, rows_along, shared

_LINES = {"forward": "-", "forward+backward": "--"}
_AXES = {
    "num_subkeys": "memory size, slots",
    "top_k": "top-k, slots read per head",
    "tokens": "tokens in one call",
}


def peak_memory(rows: Sequence[Row]) -> Figure | None:
    """Working memory of the passes, without parameters and gradients; None without data."""
    panels = {
        axis: shown
        for axis in _AXES
        if (
            shown := [along for name in _LINES if (along := rows_along(rows, axis, pass_name=name))]
        )
    }
    if not panels:
        return None
    figure, axes = new_figure(len(panels), width=5.2 * len(panels))
    captions: list[str] = []
    for axis, (field, shown) in zip(axes, panels.items(), strict=True):
        for found in shown:
            _draw(axis, field, found)
        values = sorted({getattr(row, field) for found in shown for row in found if row.ok})
        ticks = [value**2 for value in values] if field == "num_subkeys" else values
        labels = [slots_label(tick) if field == "num_subkeys" else str(tick) for tick in ticks]
        plain_log_axis(axis, "x", ticks, labels)
        axis.set_xlabel(_AXES[field])
        axis.margins(y=0.08)
        count_axis(axis)
        axis.set_ylabel("working memory of a pass, MiB")
        passes = {found[0].pass_name: found for found in shown}
        captions.append(f"Against {_AXES[field].partition(',')[0]}: {shared(passes, field)}")
    add_legend(figure, axes)
    first = next(iter(panels.values()))[0][0]
    jump = (
        "From |C| = 16 k on pkm_triton's lookup on a CPU looks at the largest of groups of scores "
        "first, which saves time and takes more memory. "
    )
    add_caption(
        figure,
        "The most memory allocated during a pass above parameters and input; of forward+backward, "
        f"the gradients it leaves are not counted. {jump if first.device == 'cpu' else ''}"
        f"{' '.join(captions)}",
    )
    return figure


def _draw(axis: Axes, field: str, found: Sequence[Row]) -> None:
    for key, series in by_series(found).items():
        colour, marker, label = SERIES_STYLE[key]
        pass_name = series[0].pass_name
        axis.plot(
            [row.num_slots if field == "num_subkeys" else getattr(row, field) for row in series],
            [row.working_bytes / 2**20 for row in series],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=_LINES[pass_name],
            label=f"{label}, {pass_name}{gradient(series[0])}",
        )
