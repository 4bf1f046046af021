"""A measured row of a sweep, and the CSV file that holds them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .points import Point
from .row_file import RowFile as _RowFile
from .row_file import columns_of
from .row_file import read_rows as _read_rows

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
COLUMNS = columns_of(Row)


def point_of(row: Row) -> Point:
    """The parameters of a row, without its measurements."""
    return Point(**{name: getattr(row, name) for name in POINT_FIELDS})


def read_rows(path: Path) -> list[Row]:
    """Read the CSV of a sweep.

    Raises:
        ValueError: there is no such file, it is no sweep, or it is of another schema version.
    """
    return _read_rows(path, Row)


class RowFile(_RowFile[Row]):
    """The rows of a sweep's CSV file (see `row_file.RowFile`).

    Raises:
        ValueError: the file exists and is not of this schema version.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row)

    def get(self, point: Point, device_name: str) -> Row | None:
        """The row of that point on that device, if it has been measured."""
        return self.find((*(getattr(point, name) for name in POINT_FIELDS), device_name))
