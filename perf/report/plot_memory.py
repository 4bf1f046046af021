"""Peak memory of a pass, against memory size and against top-k."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.records.sweep_row import Row

from .plot_style import (
    SERIES_STYLE,
    add_caption,
    count_axis,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import by_series, describe, machine, rows_along

_LINES = {"forward": "-", "forward+backward": "--"}


def peak_memory(rows: Sequence[Row]) -> Figure | None:
    """Working memory of the passes, without parameters and gradients; None without data."""
    panels = {
        axis: shown
        for axis in ("num_subkeys", "top_k")
        if (
            shown := [along for name in _LINES if (along := rows_along(rows, axis, pass_name=name))]
        )
    }
    if not panels:
        return None
    figure, axes = new_figure(len(panels), width=5.0 * len(panels))
    captions: list[str] = []
    for axis, (field, shown) in zip(axes, panels.items(), strict=True):
        for found in shown:
            _draw(axis, field, found)
        values = sorted({getattr(row, field) for found in shown for row in found if row.ok})
        if field == "num_subkeys":
            ticks = [value**2 for value in values]
            plain_log_axis(axis, "x", ticks, [slots_label(tick) for tick in ticks])
            axis.set_xlabel("memory size, slots")
        else:
            plain_log_axis(axis, "x", values, [str(value) for value in values])
            axis.set_xlabel("top-k, slots read per head")
        count_axis(axis)
        axis.set_ylabel("peak extra memory, MiB")
        captions.append(f"{axis.get_xlabel().split(',')[0]}: {describe(shown[0][0], field)}")
    # Panels need not show the same series.
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(
        handles=list(lines.values()), loc="outside upper center", ncols=3, fontsize=8, frameon=False
    )
    add_caption(
        figure,
        "The most memory allocated during a pass above parameters and input; of forward+backward, "
        f"the gradients it leaves are not counted. Against {'; against '.join(captions)}. "
        f"{machine(next(iter(panels.values()))[0][0])}.",
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
            label=f"{label}, {pass_name}",
        )
