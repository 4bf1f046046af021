"""Depth against memory: perplexity and speed, the paper's Table 1 and Figure 4."""

import dataclasses

from matplotlib.figure import Figure

from pkm_triton.perf import paper
from pkm_triton.perf.plot_style import BLUE, GREY, ORANGE, PURPLE, SKY, add_caption, new_figure
from pkm_triton.perf.table import MISSING, markdown
from pkm_triton.transformer import memory_layers

from .memory_size import without_memory
from .presets import Preset
from .summary import Report, Results, about, published
from .trial import Trial

TITLE = "Depth against memory (the paper's Table 1 and Figure 4)"
_COLOURS = (GREY, BLUE, ORANGE, PURPLE, SKY)
_MARKERS = "so^Dv"


def _at(preset: Preset, base: Trial, dim: int, layers: int, memories: int) -> Trial:
    sized = dataclasses.replace(
        base,
        num_subkeys=preset.depth_size,
        dim=dim,
        ffn_dim=base.ffn_dim * dim // base.dim,
        layers=layers,
        memory_layers="+".join(map(str, memory_layers(layers, memories))),
    )
    return sized if memories else without_memory(sized)


def _grid(preset: Preset, base: Trial) -> dict[tuple[int, int, int], Trial]:
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
    most = max(count for counts in preset.depths.values() for count in counts.values())
    header = ["", *(f"N = {memories}" for memories in range(most + 1))]
    caption = about(results, base, "layers", "memory_layers")
    sections = [caption]
    for title, texts in (
        ("Perplexity", {key: cell.text("perplexity", ".2f") for key, cell in cells.items()}),
        (
            "Bits per byte",
            {
                key: cell.text("bits_per_byte", ".4f")
                for key, cell in cells.items()
                if cell.text("bits_per_byte", ".4f") != MISSING
            },
        ),
        (
            "Tokens a second at inference",
            {key: f"{row.tokens_per_s:,.4g}" for key, row in speeds.items()},
        ),
        (
            "Parameters, millions",
            {key: f"{row.parameters / 1e6:,.4g}" for key, row in speeds.items()},
        ),
    ):
        if texts:
            lines = [
                [
                    f"{layers} layers, width {dim}",
                    *(texts.get((dim, layers, memories), MISSING) for memories in range(most + 1)),
                ]
                for dim, counts in preset.depths.items()
                for layers in counts
            ]
            sections.append(markdown([title, *header[1:]], lines))
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
    if cells and speeds:
        figures["depth"] = _figure(results, preset, grid, caption)
    return Report(sections, figures)


def _figure(
    results: Results, preset: Preset, grid: dict[tuple[int, int, int], Trial], caption: str
) -> Figure:
    figure, axes = new_figure(len(preset.depths), width=6.5 * len(preset.depths), height=5)
    for axis, (dim, counts) in zip(axes, preset.depths.items(), strict=True):
        for memories in range(max(counts.values()) + 1):
            points = []
            for layers in counts:
                trial = grid.get((dim, layers, memories))
                cell = results.cell(trial) if trial else None
                row = results.speed(trial) if trial else None
                if cell and row:
                    points.append((row.tokens_per_s, cell, layers))
            if not points:
                continue
            colour = _COLOURS[memories % 5]
            label = f"{memories} memor{'y' if memories == 1 else 'ies'}"
            xs = [speed for speed, *_ in points]
            ys = [cell.mean("perplexity") for _, cell, _ in points]
            axis.plot(xs, ys, color=colour, marker=_MARKERS[memories % 5], label=label)
            for x, y, (_, cell, layers) in zip(xs, ys, points, strict=True):
                low, high = cell.ends("perplexity")
                axis.plot([x, x], [low, high], color=colour, linewidth=1)
                axis.annotate(
                    str(layers), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=9
                )
        axis.set_xlabel("tokens per second at inference")
        axis.set_ylabel("test perplexity")
        axis.set_title(f"Width {dim}", fontsize=11)
        axis.legend(fontsize=8, frameon=False)
    rows = [row for trial in grid.values() if (row := results.speed(trial))]
    add_caption(
        figure,
        "Labels: layers. The nearer to the lower right, the better. " + caption,
        f"Speed: {rows[0].device_name}, {rows[0].threads} threads, {rows[0].sequences} sequences "
        "in a call.",
    )
    return figure
