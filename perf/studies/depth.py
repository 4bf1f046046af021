"""Depth against memory: perplexity and speed, the paper's Table 1 and Figure 4."""

import dataclasses
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pkm_triton.perf.report import paper
from pkm_triton.perf.report.plot_style import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    add_caption,
    new_figure,
)
from pkm_triton.perf.report.table import MISSING, markdown
from pkm_triton.transformer import memory_layers

from .presets import Preset
from .records import TimedRow
from .summary import Cell, Report, Results, about, published
from .trial import Trial

TITLE = "Depth against memory (the paper's Table 1 and Figure 4)"
_STYLES = ((GREY, "s"), (BLUE, "o"), (ORANGE, "^"), (PURPLE, "D"), (SKY, "v"))

Key = tuple[int, int, int]
"""Width, layers and memories of a model."""


def _at(preset: Preset, base: Trial, dim: int, layers: int, memories: int) -> Trial:
    sized = dataclasses.replace(
        base,
        num_subkeys=preset.depth_size,
        dim=dim,
        ffn_dim=base.ffn_dim * dim // base.dim,
        attention_heads=base.attention_heads * preset.depth_heads,
        layers=layers,
        memory_layers="+".join(map(str, memory_layers(layers, memories))),
    )
    return sized if memories else sized.without_memory()


def _grid(preset: Preset, base: Trial) -> dict[Key, Trial]:
    return {
        (dim, layers, memories): _at(preset, base, dim, layers, memories)
        for dim, most in preset.depths.items()
        for layers, count in most.items()
        for memories in range(count + 1)
    }


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """Every width, depth and number of memories."""
    return list(_grid(preset, base).values())


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """The same."""
    return trials(preset, base)


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Table 1 and Figure 4."""
    grid = _grid(preset, base)
    cells = {key: cell for key, trial in grid.items() if (cell := results.cell(trial))}
    speeds = {key: row for key, trial in grid.items() if (row := results.speed(trial))}
    if not cells and not speeds:
        return Report([], {})
    caption = about(results, base, "layers", "memory_layers", "num_subkeys")
    caption += f" Memories of {preset.depth_size}² slots."
    sections = [
        caption,
        _table(preset, "Perplexity", {k: c.text("perplexity", ".2f") for k, c in cells.items()}),
        _table(
            preset,
            "Bits per byte",
            {key: cell.text("bits_per_byte", ".4f") for key, cell in cells.items()},
        ),
        _table(
            preset,
            "Tokens a second at inference",
            {key: f"{row.tokens_per_s:,.0f}" for key, row in speeds.items()},
        ),
        _table(
            preset,
            "Parameters, millions",
            {key: f"{row.parameters / 1e6:,.3f}" for key, row in speeds.items()},
        ),
    ]
    lines = [
        published(f"{layers} layers, width {dim}", (*row, *[None] * (4 - len(row))), ".1f")
        for dim, rows in paper.TABLE_1.items()
        for layers, row in rows.items()
    ]
    sections += [
        "The paper's own perplexities:",
        markdown(["Perplexity", "N = 0", "N = 1", "N = 2", "N = 3"], lines),
    ]
    figures = {}
    perplexities = {key: cell.mean("perplexity") for key, cell in cells.items()} or _published()
    if speeds and perplexities.keys() & speeds.keys():
        figures["depth"] = _figure(preset, perplexities, cells, speeds, caption)
    return Report([each for each in sections if each], figures)


def _table(preset: Preset, title: str, texts: Mapping[Key, str]) -> str:
    if not texts:
        return ""
    most = max(count for counts in preset.depths.values() for count in counts.values())
    lines = [
        [
            f"{layers} layers, width {dim}",
            *(texts.get((dim, layers, memories), MISSING) for memories in range(most + 1)),
        ]
        for dim, counts in preset.depths.items()
        for layers in counts
    ]
    return markdown([title, *(f"N = {memories}" for memories in range(most + 1))], lines)


def _published() -> dict[Key, float]:
    return {
        (dim, layers, memories): perplexity
        for dim, rows in paper.TABLE_1.items()
        for layers, row in rows.items()
        for memories, perplexity in enumerate(row)
    }


def _figure(
    preset: Preset,
    perplexities: Mapping[Key, float],
    cells: Mapping[Key, Cell],
    speeds: Mapping[Key, TimedRow],
    caption: str,
) -> Figure:
    figure, axes = new_figure(len(preset.depths), width=6 * len(preset.depths), height=5.2)
    for axis, (dim, counts) in zip(axes, preset.depths.items(), strict=True):
        for memories in range(max(counts.values()) + 1):
            keys = [(dim, layers, memories) for layers in counts]
            _line(axis, [key for key in keys if key in perplexities and key in speeds],
                  perplexities, cells, speeds)  # fmt: skip
        axis.set_xlabel("tokens per second at inference")
        axis.set_ylabel("test perplexity" if cells else "test perplexity, the paper's")
        axis.set_title(f"Width {dim}", fontsize=11)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
        axis.margins(0.12)
    row = next(iter(speeds.values()))
    notes = ["Labels: layers. The nearer to the lower right, the better.", caption]
    if not cells:
        notes[1] = f"Perplexities are the paper's (Table 1). {caption}"
    add_caption(
        figure,
        " ".join(notes),
        f"Speed: {row.device_name}, {row.threads} thread{'s' * (row.threads > 1)}, "
        f"{row.sequences * row.context} tokens in a call, random weights.",
    )
    return figure


def _line(
    axis: Axes,
    keys: list[Key],
    perplexities: Mapping[Key, float],
    cells: Mapping[Key, Cell],
    speeds: Mapping[Key, TimedRow],
) -> None:
    """The models of one width and number of memories, from shallow to deep."""
    if not keys:
        return
    memories = keys[0][2]
    colour, marker = _STYLES[memories % len(_STYLES)]
    label = {0: "no memory", 1: "1 memory"}.get(memories, f"{memories} memories")
    xs = [speeds[key].tokens_per_s for key in keys]
    axis.plot(xs, [perplexities[key] for key in keys], color=colour, marker=marker, label=label)
    for x, key in zip(xs, keys, strict=True):
        if key in cells:
            axis.plot([x, x], cells[key].ends("perplexity"), color=colour, linewidth=1)
        axis.annotate(
            str(key[1]),
            (x, perplexities[key]),
            textcoords="offset points",
            xytext=(6, -12),  # below the line, which falls to the left
            fontsize=9,
            color=colour,
        )
