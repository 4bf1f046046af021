"""A measured row of a sweep, and the CSV file that holds them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .points import Point
from .row_file import RowFile as _RowFile
from .row_file import added, columns_of
from .row_file import read_rows as _read_rows

SCHEMA = 4
"""Raised by one whenever a column is added (see `row_file.added`). 2: seed to remark. 3: compile_s
and product_flops_per_s. 4: ranks, layout, sent_bytes and counted_bytes."""

_NAN = math.nan


@dataclass(frozen=True)
class Row(Point):
    """A point and what was measured there. The fields are the header of the CSV, in this order.

    A figure that does not exist is NaN, an empty cell in the CSV: the parts of a layer that
    cannot be taken apart, everything of a row that is not `ok`.

    Attributes:
        device_name: the processor or the GPU; part of the row's key, see `Row.key`.
        seed: of parameters, inputs and generated reads.
        seconds: time asked for on each pass; 0 where it was not recorded.
        median_ms, low_ms, high_ms: median, 20th and 80th percentile of one pass, milliseconds; on
            a GPU that was idle, launches included.
        samples: passes timed.
        cpu_ms: median CPU time of one pass, all threads together; on a GPU, of the launches.
        others: cores' worth of CPU time that other processes took meanwhile.
        graph_ms: median time of a pass replayed from a CUDA graph: of its kernels alone.
        first_call_s: time of the first pass, compiling included; in no other figure.
        compile_s: seconds of that in which Triton compiled, on a GPU; 0 where its cache had all.
        copy_bytes_per_s: what a copy on the device moved in the same run.
        product_flops_per_s: what a bfloat16 product on the GPU did in the same run.
        remark: `busy: why` where the machine was, or the passes differ much; else empty.
        tokens_per_s: tokens / median, of all ranks together.
        query_ms, lookup_ms, gather_ms: medians of the three parts, each timed on its own.
        peak_bytes: the most memory allocated during a pass, above what was there before it.
        working_bytes: the same without the gradients that the pass leaves behind.
        parameter_bytes: parameters and buffers of the layer.
        moved_bytes: compulsory traffic by formula (`roofline.py`).
        sent_bytes: what rank 0 sends to others in a pass, by formula (`distributed.traffic`); of
            more than one rank, times and memory too are rank 0's.
        counted_bytes: the same, counted.
        roofline: share of the device's memory bandwidth, moved_bytes / median / bandwidth.
        status: `ok`, `oom: why`, `skipped: why` or `failed: why`.
    """

    device_name: str = ""
    seed: int = added(2, 0)
    seconds: float = added(2, 0.0)
    median_ms: float = _NAN
    low_ms: float = _NAN
    high_ms: float = _NAN
    samples: int = 0
    cpu_ms: float = added(2, _NAN)
    others: float = added(2, _NAN)
    graph_ms: float = added(2, _NAN)
    first_call_s: float = added(2, _NAN)
    compile_s: float = added(3, _NAN)
    copy_bytes_per_s: float = added(2, _NAN)
    product_flops_per_s: float = added(3, _NAN)
    remark: str = added(2, "")
    tokens_per_s: float = _NAN
    query_ms: float = _NAN
    lookup_ms: float = _NAN
    gather_ms: float = _NAN
    peak_bytes: float = _NAN
    working_bytes: float = _NAN
    parameter_bytes: float = _NAN
    moved_bytes: float = _NAN
    sent_bytes: float = added(4, _NAN)
    counted_bytes: float = added(4, _NAN)
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
        """What makes a row unique: its point, the device, the seed and the time spent.

        Versions and commit are left out on purpose: a folder holds one state of the software, and
        a run that was cut off goes on after a commit. Measure another version into another folder
        and put the two side by side with `pkm-perf compare`.
        """
        return (*(getattr(self, name) for name in POINT_FIELDS), *self.circumstances)

    @property
    def circumstances(self) -> tuple[Any, ...]:
        """Where and how the point was measured: rows of one picture or table share it."""
        return (self.device_name, self.seed, self.seconds)

    def problem(self) -> str | None:
        """Why these figures cannot have been measured, or None."""
        for name in _FIGURES:
            value = getattr(self, name)
            if not (math.isnan(value) or 0 <= value < math.inf):
                return f"{name} is {value}; a figure of at least 0 was expected"
        if not self.ok:
            return None
        for name in ("median_ms", "low_ms", "high_ms"):
            value = getattr(self, name)
            if not value > 0:
                return f"status is ok, but {name} is {value}; a time above 0 was expected"
        if not self.low_ms <= self.median_ms <= self.high_ms:
            return f"median_ms {self.median_ms} is not between {self.low_ms} and {self.high_ms}"
        return None


_FIGURES = tuple(field.name for field in dataclasses.fields(Row) if field.type is float)
POINT_FIELDS = tuple(field.name for field in dataclasses.fields(Point))
COLUMNS = columns_of(Row)


def point_of(row: Row) -> Point:
    """The parameters of a row, without its measurements."""
    return Point(**{name: getattr(row, name) for name in POINT_FIELDS})


CSV_NAME = "sweep.csv"


def csv_path(path: Path) -> Path:
    """The CSV itself, where its folder is given."""
    return path / CSV_NAME if path.is_dir() else path


def read_rows(path: Path) -> list[Row]:
    """Read the CSV of a sweep.

    Raises:
        ValueError: see `row_file.read_rows`.
    """
    return _read_rows(path, Row)


class RowFile(_RowFile[Row]):
    """The rows of a sweep's CSV file (see `row_file.RowFile`).

    Raises:
        ValueError: the file exists and does not hold such rows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Row)

    def get(self, point: Point, device_name: str, seed: int, seconds: float) -> Row | None:
        """The row of that point on that device, if it has been measured so."""
        key = (getattr(point, name) for name in POINT_FIELDS)
        return self.find((*key, device_name, seed, seconds))
