"""Everything a sweep's CSV is turned into: tables and pictures."""

from collections.abc import Sequence
from pathlib import Path

from pkm_triton.perf.records.files import write_whole
from pkm_triton.perf.records.sweep_row import Row

from .plot_comparison import comparison
from .plot_memory import peak_memory
from .plot_parts import time_by_part
from .plot_speed import speed_against_heads, speed_against_size, speed_against_top_k
from .plot_step import step_against_reads
from .plot_style import save
from .table import comparison_table, size_table

_TABLES = {"table": size_table, "comparison": comparison_table}
_PICTURES = {
    "speed_against_size": speed_against_size,
    "speed_against_top_k": speed_against_top_k,
    "speed_against_heads": speed_against_heads,
    "time_by_part": time_by_part,
    "peak_memory": peak_memory,
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
