"""Everything a sweep's CSV is turned into: tables and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pkm_triton.perf.records.files import write_whole
from pkm_triton.perf.records.sweep_row import Row

from .plot_bandwidth import bandwidth_share
from .plot_comparison import comparison
from .plot_memory import peak_memory
from .plot_parts import time_by_part
from .plot_ranks import speed_over_ranks
from .plot_speed import NAMED, NUMERIC, speed_against_size, speed_along
from .plot_step import step_against_reads
from .plot_style import save
from .table import all_rows_table, comparison_table, size_table

_TABLES = {"table": size_table, "comparison": comparison_table, "rows": all_rows_table}
Draw = Callable[[Sequence[Row]], Figure | None]


def _along(axis: str) -> Draw:
    return lambda rows: speed_along(rows, axis)


_PICTURES: dict[str, Draw] = {
    "speed_against_size": speed_against_size,
    **{f"speed_against_{axis}": _along(axis) for axis in (*NUMERIC, *NAMED)},
    "speed_over_ranks": speed_over_ranks,
    "time_by_part": time_by_part,
    "peak_memory": peak_memory,
    "bandwidth_share": bandwidth_share,
    "step_against_reads": step_against_reads,
    "comparison": comparison,
}


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write each table and picture that the rows suffice for; returns the files written."""
    written: list[Path] = []
    for name, make_table in _TABLES.items():
        text = make_table(rows)
        if text is not None:
            path = folder / f"{name}.md"
            write_whole(path, text + "\n")
            written.append(path)
    for name, draw in _PICTURES.items():
        figure = draw(rows)
        if figure is not None:
            written += save(figure, folder / name)
    return written
