"""Facts learned by heart: how many a memory of each size recalls, against an FFN."""

import dataclasses
from typing import Any

from matplotlib.figure import Figure

from pkm_triton.perf.report.plot_style import (
    BLUE,
    GREY,
    ORANGE,
    add_caption,
    count_label,
    new_figure,
    plain_log_axis,
    slots_label,
)
from pkm_triton.perf.report.table import MISSING, markdown

from .presets import Preset
from .records import TimedRow
from .summary import Cell, Report, Results, about, draw
from .trial import Trial

TITLE = "Facts: capacity against memory size"


def _sized(base: Trial, size: int) -> Trial:
    return dataclasses.replace(base, num_subkeys=size)


def _ffn(base: Trial, width: int) -> Trial:
    return dataclasses.replace(base.without_memory(), ffn_dim=width)


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Memories of all sizes, and FFNs of several widths."""
    ffns = [_ffn(base, width) for width in preset.fact_ffns]
    return [*ffns, *(_sized(base, size) for size in preset.fact_sizes)]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """The same."""
    return trials(preset, base)


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Recall by memory size, beside FFNs of several widths."""
    lines = []
    for width in preset.fact_ffns:
        trial = _ffn(base, width)
        name = f"FFN, hidden width {width}"
        lines.append(_line(name, results.cell(trial), results.speed(trial), base.facts))
    for size in preset.fact_sizes:
        trial = _sized(base, size)
        name = f"memory, {slots_label(size**2)} slots"
        lines.append(_line(name, results.cell(trial), results.speed(trial), base.facts))
    if all(text == MISSING for texts in lines for text in texts[1:]):
        return Report([], {})
    header = ["model", "recall", "facts recalled", "loss (nats)", "usage (%)", "KL"]
    header += ["parameters", "tokens/s at inference"]
    caption = (
        f"{base.facts:,} facts of a key of three symbols and a value of two, 16 bits each; "
        "a fact counts if both symbols of its value have the highest logit. "
        f"{about(results, base, 'num_subkeys', 'tokens')}"
    )
    trained = any(results.cell(_sized(base, size)) for size in preset.fact_sizes)
    # Without a memory that was trained there is nothing to draw.
    figures = {"facts": _figure(results, preset, base, caption)} if trained else {}
    return Report([caption, markdown(header, lines)], figures)


def _line(name: str, cell: Cell | None, row: TimedRow | None, facts: int) -> list[str]:
    texts = [MISSING] * 6
    if cell:
        texts = [
            cell.text("recall", ".2f", 100.0) + " %",
            f"{cell.mean('recall') * facts:,.0f}",
            cell.text("loss", ".3f"),
            cell.text("usage", ".1f", 100.0),
            cell.text("kl", ".2f"),
            f"{cell.rows[0].parameters:,}",
        ]
    return [name, *texts, f"{row.tokens_per_s:,.0f}" if row else MISSING]


def _figure(results: Results, preset: Preset, base: Trial, caption: str) -> Figure:
    figure, (recall, speed) = new_figure(2, width=11, height=4.6)
    slots = [size**2 for size in preset.fact_sizes]
    cells = [results.cell(_sized(base, size)) for size in preset.fact_sizes]
    draw(recall, slots, cells, "recall", scale=100, color=BLUE, marker="o", label="memory")
    for place, width in enumerate(preset.fact_ffns):
        cell = results.cell(_ffn(base, width))
        if cell:
            style: dict[str, Any] = {
                "color": (GREY, ORANGE)[place % 2],
                "linestyle": ("--", ":", "-.")[place % 3],
            }
            recall.axhline(cell.mean("recall") * 100, label=f"FFN, hidden width {width}", **style)
    plain_log_axis(recall, "x", slots, [slots_label(tick) for tick in slots])
    for axis in (recall, speed):
        axis.set_ylim(0, 105)
    recall.set_xlabel("memory size, slots")
    recall.set_ylabel("facts recalled, %")
    recall.set_title("Recall against memory size", fontsize=11)
    recall.legend(fontsize=8, frameon=False)
    for places, label, colour, marker in (
        ([_sized(base, size) for size in preset.fact_sizes], "memory", BLUE, "o"),
        ([_ffn(base, width) for width in preset.fact_ffns], "FFN", GREY, "s"),
    ):
        points = [
            (row.tokens_per_s, cell.mean("recall") * 100)
            for trial in places
            if (cell := results.cell(trial)) and (row := results.speed(trial))
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            speed.plot(xs, ys, color=colour, marker=marker, markersize=5, label=label)
    speed.xaxis.set_major_formatter(lambda value, _: count_label(value))
    speed.set_xlabel("tokens per second at inference")
    speed.set_ylabel("facts recalled, %")
    speed.set_title("Recall against speed", fontsize=11)
    if speed.get_legend_handles_labels()[0]:
        speed.legend(fontsize=8, frameon=False)
    add_caption(figure, caption)
    return figure
