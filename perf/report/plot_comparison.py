"""Speed of the implementations side by side."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from pkm_triton.perf.records.points import IMPLEMENTATIONS
from pkm_triton.perf.records.sweep_row import Row

from .plot_style import SERIES_STYLE, add_caption, add_legend, label_bars, new_figure
from .slices import compared, describe, reliability, told_apart

_SHOWN = ("pass_name", "sparse_grad", "reads", "tokens", "top_k", "threads")
"""What every group of bars, and its panel, says of its point."""


def comparison(rows: Sequence[Row]) -> Figure | None:
    """Speed relative to the textbook layer, for rows of one memory; None without such rows.

    One panel per number of threads, one group of bars per pass, tokens and top-k.
    """
    sets = [found for found in compared(rows) if "textbook" in found]
    if (
        not sets
        or len({(row.num_subkeys, row.heads) for found in sets for row in found.values()}) > 1
    ):
        return None
    apart = told_apart([found["textbook"] for found in sets], *_SHOWN)
    names = [name for name in IMPLEMENTATIONS if any(name in found for found in sets)]
    threads = sorted({found["textbook"].threads for found in sets})
    tallest = max(sum(found["textbook"].threads == each for found in sets) for each in threads)
    figure, axes = new_figure(len(threads), 5.4 * len(threads), 1.8 + 0.42 * tallest)
    for axis, count in zip(axes, threads, strict=True):
        shown = [found for found in sets if found["textbook"].threads == count]
        height, middle = 0.8 / len(names), (len(names) - 1) / 2
        for lane, name in enumerate(names):
            places = [place + (lane - middle) * height for place in range(len(shown))]
            speeds = [
                found["textbook"].median_ms / found[name].median_ms if name in found else 0
                for found in shown
            ]
            colour, _, _ = SERIES_STYLE[(name, "product")]
            bars = axis.barh(places, speeds, height=height, color=colour, label=name)
            label_bars(axis, bars, [f"{speed:.2f}" if speed else "" for speed in speeds])
        axis.axvline(1, color="black", linewidth=0.8, zorder=0.9)
        axis.margins(x=0.08)
        axis.set_yticks(
            range(len(shown)), [_label(found["textbook"], apart) for found in shown], fontsize=8
        )
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlabel("speed relative to the textbook layer (more is faster)")
        axis.set_title(f"{count} thread{'s' * (count > 1)}", fontsize=11)
    add_legend(figure, axes)
    first = sets[0]["textbook"]
    device = "" if "device_name" in apart else f"{first.device_name}; "
    add_caption(
        figure,
        "Ratios of medians, of interleaved rounds where one run held the implementations in "
        f"memory together: {describe(first, *_SHOWN, *apart)}. "
        f"{device}torch {first.torch_version}, pkm_triton {first.pkm_triton_version}. "
        f"{reliability(row for found in sets for row in found.values())}",
    )
    return figure


def _label(row: Row, apart: Sequence[str]) -> str:
    gradients = f", {'sparse' if row.sparse_grad else 'dense'}" if row.backward else ""
    reads = "" if row.reads == "layer" else f", {row.reads} reads"
    tokens = f"{row.tokens} token{'s' * (row.tokens > 1)}"
    more = "".join(f", {name.replace('_', ' ')} {getattr(row, name)}" for name in apart)
    return f"{row.pass_name}{gradients}{reads}\n{tokens}, k {row.top_k}{more}"
