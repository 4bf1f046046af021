"""The share of what a copy on the same device moved, against memory size: how near to the floor."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pkm_triton.perf.records.sweep_row import Row

from .plot_style import (
    GREY,
    SERIES_STYLE,
    add_caption,
    add_legend,
    new_figure,
    plain_log_axis,
    slots_label,
)
from .slices import by_series, describe, machine, reliability, rows_along


def share_of_copy(row: Row) -> float:
    """moved_bytes / median, as a share of what a copy moved; NaN where one is not known."""
    return row.moved_bytes / (row.median_ms / 1e3) / row.copy_bytes_per_s


def share_of_copy_in_graph(row: Row) -> float:
    """The same of the kernels alone."""
    return row.moved_bytes / (row.graph_ms / 1e3) / row.copy_bytes_per_s


def bandwidth_share(rows: Sequence[Row]) -> Figure | None:
    """Share of the measured copy against slots; None without two sizes whose share is known."""
    along = rows_along(rows, "num_subkeys", pass_name="forward", least=2)
    found = [row for row in along if row.ok and share_of_copy(row) > 0]
    if len({row.num_subkeys for row in found}) < 2:
        return None
    figure, (axis,) = new_figure(1, width=6.4)
    for key, series in by_series(found).items():
        colour, marker, label = SERIES_STYLE[key]
        slots = [row.num_slots for row in series]
        shares = [share_of_copy(row) for row in series]
        axis.plot(slots, shares, color=colour, marker=marker, markersize=5, label=label)
        alone = [row for row in series if share_of_copy_in_graph(row) > 0]
        if alone:
            axis.plot(
                [row.num_slots for row in alone],
                [share_of_copy_in_graph(row) for row in alone],
                color=colour,
                linestyle="--",
            )
    if any(share_of_copy_in_graph(row) > 0 for row in found):
        axis.plot([], [], color=GREY, linestyle="--", label="the kernels alone (CUDA graph)")
    sizes = sorted({row.num_slots for row in found})
    plain_log_axis(axis, "x", sizes, [slots_label(size) for size in sizes])
    axis.set_xlabel("memory size, slots")
    axis.set_ylabel("share of the measured copy")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    add_legend(figure, [axis])
    copies = sorted(row.copy_bytes_per_s / 1e9 for row in found)
    add_caption(
        figure,
        "Bytes that a forward pass must move, by formula, over its time, as a share of what a copy "
        f"moved in the same run ({copies[len(copies) // 2]:,.0f} GB/s). "
        f"{describe(found[0], 'num_subkeys')}. {machine(found[0])}. {reliability(found)}",
    )
    return figure
