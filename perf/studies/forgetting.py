"""What learning new facts costs of the old: all weights, adapters, or a memory's slots trained."""

import dataclasses

from matplotlib.figure import Figure

from pkm_triton.perf.report.plot_style import BLUE, GREY, ORANGE, add_caption, new_figure
from pkm_triton.perf.report.table import MISSING, markdown

from .presets import Preset
from .summary import Cell, Report, Results, about
from .trial import Trial

TITLE = "Forgetting: facts kept against facts learnt (Lin et al. 2025)"
_COLOURS = {"all": GREY, "adapter": ORANGE, "slots": BLUE}
_LINES = ("-", "--", ":", "-.")


def _tunings(preset: Preset, base: Trial) -> dict[str, list[Trial]]:
    return {
        way: [dataclasses.replace(base, tuning=way, tuning_lr=lr) for lr in rates]
        for way, rates in preset.tunings.items()
    }


def trials(preset: Preset, base: Trial) -> list[Trial]:
    """The model of the first facts, and each way to train it on more of them."""
    tuned = [trial for each in _tunings(preset, base).values() for trial in each]
    return [base.before_tuning(), *tuned]


def timed(preset: Preset, base: Trial) -> list[Trial]:
    """Nothing: at inference all are one model."""
    return []


def report(results: Results, preset: Preset, base: Trial) -> Report:
    """Facts learnt and kept by each way at each learning rate, as a table and a picture."""
    ways = _tunings(preset, base)
    lines = [_line(trial, results.cell(trial)) for tunings in ways.values() for trial in tunings]
    if all(text == MISSING for line in lines for text in line[2:]):
        return Report([], {})
    first = results.cell(base.before_tuning())
    known = f", of which it then recalls {first.text('recall', '.1f', 100)} %" if first else ""
    caption = (
        f"A model learns {base.facts:,} facts{known}, and then {base.tuning_facts:,} more in "
        f"{base.tuning_steps:,} steps that show none of the first again. "
        f"{about(results, base, 'tokens')}"
    )
    header = ["what trains", "learning rate", "parameters", "learnt (%)", "kept (%)"]
    figure = _figure(results, ways, first, caption)
    return Report([caption, markdown(header, lines)], {"forgetting": figure})


def _words(trial: Trial) -> str:
    kind, size = trial.tuned_by
    words = {
        "all": "all weights",
        "adapter": f"adapters of rank {size}",
        "slots": f"{size:,} slots",
    }
    return words[kind]


def _line(trial: Trial, cell: Cell | None) -> list[str]:
    texts = [MISSING] * 3
    if cell:
        texts = [
            f"{cell.mean('tuned_parameters'):,.0f}",
            cell.text("recall", ".1f", 100.0),
            cell.text("kept", ".1f", 100.0),
        ]
    return [_words(trial), f"{trial.tuning_lr:g}", *texts]


def _figure(
    results: Results, ways: dict[str, list[Trial]], first: Cell | None, caption: str
) -> Figure:
    figure, (axis,) = new_figure(1, width=7.5, height=5.4)
    drawn: dict[str, int] = {}
    for tunings in ways.values():
        cells = [cell for trial in tunings if (cell := results.cell(trial))]
        if not cells:
            continue
        kind, _ = tunings[0].tuned_by
        style = _LINES[drawn.get(kind, 0) % len(_LINES)]
        drawn[kind] = drawn.get(kind, 0) + 1
        axis.plot(
            [cell.mean("recall") * 100 for cell in cells],
            [cell.mean("kept") * 100 for cell in cells],
            color=_COLOURS[kind],
            linestyle=style,
            marker="o",
            markersize=5,
            label=_words(tunings[0]),
        )
    if first is not None:
        known = first.mean("recall") * 100
        axis.axhline(known, color=GREY, linewidth=0.8, linestyle=":", label="before")
    axis.set_xlim(-3, 105)
    axis.set_ylim(-3, 105)
    axis.set_xlabel("new facts learnt, %")
    axis.set_ylabel("old facts kept, %")
    axis.set_title("A point a learning rate: up and to the right is better", fontsize=11)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    add_caption(figure, caption)
    return figure
