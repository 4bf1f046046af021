"""A measured row, and the CSV file that holds rows: written whole at every change."""

import dataclasses
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .files import write_whole
from .points import Point

SCHEMA = 1
"""Raised by one whenever a column is added, removed, or changes its meaning."""

_NAN = math.nan


@dataclass(frozen=True)
class Row(Point):
    """A point and what was measured there. The fields are the header of the CSV, in this order.

    A figure that does not exist is NaN, an empty cell in the CSV: the parts of a layer that
    cannot be taken apart, everything of a row that is not `ok`.

    Attributes:
        device_name: the processor or the GPU; part of the row's key, see `Row.key`.
        median_ms, low_ms, high_ms: median, 20th and 80th percentile of one pass, milliseconds.
        samples: passes timed.
        tokens_per_s: tokens / median.
        query_ms, lookup_ms, gather_ms: medians of the three parts, each timed on its own.
        peak_bytes: the most memory allocated during a pass, above what was there before it.
        working_bytes: the same without the gradients that the pass leaves behind.
        parameter_bytes: parameters and buffers of the layer.
        moved_bytes: compulsory traffic by formula (`roofline.py`).
        roofline: share of the device's memory bandwidth, moved_bytes / median / bandwidth.
        status: `ok`, `oom: why`, `skipped: why` or `failed: why`.
    """

    device_name: str = ""
    median_ms: float = _NAN
    low_ms: float = _NAN
    high_ms: float = _NAN
    samples: int = 0
    tokens_per_s: float = _NAN
    query_ms: float = _NAN
    lookup_ms: float = _NAN
    gather_ms: float = _NAN
    peak_bytes: float = _NAN
    working_bytes: float = _NAN
    parameter_bytes: float = _NAN
    moved_bytes: float = _NAN
    roofline: float = _NAN
    torch_version: str = ""
    triton_version: str = ""
    pkm_triton_version: str = ""
    commit: str = ""
    status: str = "ok"
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether the figures are there."""
        return self.status == "ok"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row unique: its point and the device.

        Versions and commit are left out on purpose: a folder holds one state of the software, and
        a run that was cut off goes on after a commit. Measure another version into another folder
        and put the two side by side with `pkm-perf compare`.
        """
        return (*(getattr(self, name) for name in POINT_FIELDS), self.device_name)


POINT_FIELDS = tuple(field.name for field in dataclasses.fields(Point))
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
_CONVERTERS = {
    int: int,
    str: str,
    bool: {"True": True, "False": False}.__getitem__,
    float: lambda text: float(text) if text else _NAN,
}


def point_of(row: Row) -> Point:
    """The parameters of a row, without its measurements."""
    return Point(**{name: getattr(row, name) for name in POINT_FIELDS})


def read_rows(path: Path) -> list[Row]:
    """Read a CSV written by `RowFile`.

    Raises:
        ValueError: there is no such file, it is no sweep, or it is of another schema version.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ValueError(f"CSV: there is no file {str(path)!r}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"CSV: {str(path)!r} cannot be read: {error}") from error
    if "schema" not in table.columns:
        raise ValueError(f"CSV: {str(path)!r} was not written by pkm-perf (no column 'schema')")
    versions = set(table["schema"]) - {str(SCHEMA)}
    if versions:
        raise ValueError(
            f"CSV: {str(path)!r} has schema version {', '.join(sorted(versions))}, this pkm-perf "
            f"reads and writes version {SCHEMA}; give another --output or move the file away"
        )
    if tuple(table.columns) != COLUMNS:
        wrong = sorted(set(table.columns) ^ set(COLUMNS)) or ["their order"]
        raise ValueError(f"CSV: {str(path)!r} has other columns: {', '.join(wrong)}")
    try:
        return [
            Row(
                **{
                    field.name: _CONVERTERS[field.type](cell)  # pyright: ignore[reportArgumentType, reportCallIssue]
                    for field, cell in zip(dataclasses.fields(Row), cells, strict=True)
                }
            )
            for cells in table.itertuples(index=False, name=None)
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"CSV: {str(path)!r} has a cell that cannot be read: {error}") from error


def rows_to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a row, with the columns of the CSV."""
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(COLUMNS))


class RowFile:
    """The rows of a CSV file, which is replaced as a whole whenever a row is added.

    A kill at any moment leaves every row that was added, and no half of one.

    Raises:
        ValueError: the file exists and is not of this schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = read_rows(path) if path.exists() else []
        self._rows = {row.key: row for row in rows}

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which they were first added."""
        return list(self._rows.values())

    def get(self, point: Point, device_name: str) -> Row | None:
        """The row of that point on that device, if it has been measured."""
        return self._rows.get((*(getattr(point, name) for name in POINT_FIELDS), device_name))

    def add(self, *rows: Row) -> None:
        """Add rows, or replace those with the same key, and write the file."""
        self._rows.update((row.key, row) for row in rows)
        text = io.StringIO()
        rows_to_frame(self.rows).to_csv(text, index=False, lineterminator="\n")
        write_whole(self.path, text.getvalue())
