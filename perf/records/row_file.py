"""A CSV file of dataclass rows: resumable, of a known schema, shared by processes."""

import contextlib
import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from .files import write_whole

try:
    import fcntl
except ModuleNotFoundError:  # no such locks outside of Unix
    fcntl = None


class KeyedRow(Protocol):
    """A dataclass of int, str, bool and float fields, `schema` among them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row unique."""
        ...

    def problem(self) -> str | None:
        """Why these figures cannot have been measured, or None."""
        ...


R = TypeVar("R", bound=KeyedRow)

_CONVERTERS = {
    int: int,
    str: str,
    bool: {"True": True, "False": False}.__getitem__,
    float: lambda text: float(text) if text else math.nan,
}


def added(schema: int, default: Any) -> Any:
    """A field that rows before this schema version lack; `default` says that it is not known.

    To add a column: add the field so, raise the schema, and older files are read and extended
    as before.
    """
    return dataclasses.field(default=default, metadata={"since": schema})


def columns_of(kind: type[Any], schema: int | None = None) -> tuple[str, ...]:
    """The header of the CSV in a schema version: the fields of the dataclass, in order."""
    return tuple(
        field.name
        for field in dataclasses.fields(kind)
        if schema is None or field.metadata.get("since", 1) <= schema
    )


def schema_of(kind: type[Any]) -> int:
    """The schema version that this code writes: the default of the field `schema`."""
    (schema,) = (field.default for field in dataclasses.fields(kind) if field.name == "schema")
    assert isinstance(schema, int)
    return schema


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read a CSV written by `RowFile`, of this schema version or one before it.

    A last line that is cut off is left out: its writer was killed.

    Raises:
        ValueError: there is no such file, it holds other rows, is of a later schema version, or
            has a figure that cannot have been measured.
    """
    rows, _, _ = _read(path, kind)
    return rows


def rows_to_csv(rows: Iterable[Any], kind: type[Any], *, header: bool) -> str:
    """One line a row, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = columns_of(kind)
    if header:
        writer.writerow(columns)
    for row in rows:
        cells = (getattr(row, name) for name in columns)
        writer.writerow("" if cell != cell else cell for cell in cells)
    return text.getvalue()


class RowFile(Generic[R]):
    """The rows of a CSV file, to which several processes may add.

    A kill at any moment leaves every row that was added: a new row is appended, and what is left
    of a row cut off is not read. To replace a row the file is written anew as a whole.

    Args:
        path: of the CSV.
        kind: the dataclass of its rows.

    Raises:
        ValueError: the file exists and does not hold such rows.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        self.kind = kind
        self._rows: dict[tuple[Any, ...], R] = {}
        self._state: tuple[int, int] | None = None
        """Inode and size of the file when it was last read or written."""
        self._end = 0
        """Where the last whole row ends, or 0 where the file must be written anew."""
        self.refresh()

    @property
    def rows(self) -> list[R]:
        """All rows known, in the order in which they were first added."""
        return list(self._rows.values())

    def find(self, key: tuple[Any, ...]) -> R | None:
        """The row of that key, if there is one."""
        return self._rows.get(key)

    def refresh(self) -> None:
        """Read what other processes have added.

        Raises:
            ValueError: the file does not hold such rows any more.
        """
        state = _state(self.path)
        if state == self._state:
            return
        rows: list[R] = []
        end, current = 0, True
        if state is not None:
            rows, end, current = _read(self.path, self.kind)
        self._rows = {row.key: row for row in rows}
        self._state, self._end = state, end if current else 0

    def add(self, *rows: R) -> None:
        """Add rows, or replace those with the same key, and write them.

        Raises:
            OSError: the file cannot be written; it holds what it held before.
        """
        for row in rows:
            assert row.problem() is None, row.problem()
        with _locked(self.path.parent):
            self.refresh()
            updated = {**self._rows, **{row.key: row for row in rows}}
            if self._end and len(updated) == len(self._rows) + len(rows):
                self._append(rows)
            else:
                write_whole(self.path, rows_to_csv(updated.values(), self.kind, header=True))
                self._end = self.path.stat().st_size
            self._rows, self._state = updated, _state(self.path)

    def _append(self, rows: Sequence[R]) -> None:
        data = rows_to_csv(rows, self.kind, header=False).encode()
        with open(self.path, "r+b") as file:
            file.truncate(self._end)  # half a row of a process that was killed
            file.seek(self._end)
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(self._end)
                error.filename = error.filename or str(self.path)
                raise
        self._end += len(data)


def _read(path: Path, kind: type[R]) -> tuple[list[R], int, bool]:
    """The rows, the bytes they take, and whether they are of the current schema version."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"CSV: there is no file {str(path)!r}") from error
    except OSError as error:
        raise ValueError(f"CSV: {str(path)!r} cannot be read: {error.strerror}") from error
    end = _end_of_records(data)
    try:
        records = list(csv.reader(io.StringIO(data[:end].decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"CSV: {str(path)!r} cannot be read: {error}") from error
    if not records or "schema" not in records[0]:
        raise ValueError(f"CSV: {str(path)!r} was not written by pkm-perf (no column 'schema')")
    header, *lines = records
    newest = schema_of(kind)
    schema = _schema_of_file(path, header, lines, newest)
    columns = columns_of(kind, schema)
    if tuple(header) != columns:
        wrong = sorted(set(header) ^ set(columns)) or ["their order"]
        raise ValueError(f"CSV: {str(path)!r} has other columns: {', '.join(wrong)}")
    convert = {field.name: _CONVERTERS[field.type] for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    rows: list[R] = []
    for number, cells in enumerate(lines, start=2):
        where = f"CSV: {str(path)!r}, record {number}:"
        if len(cells) != len(header):
            raise ValueError(f"{where} {len(cells)} cells where the header has {len(header)}")
        try:
            fields = {name: convert[name](cell) for name, cell in zip(header, cells, strict=True)}
            row = kind(**{**fields, "schema": newest})
        except (KeyError, ValueError) as error:
            raise ValueError(f"{where} has a cell that cannot be read: {error}") from error
        problem = row.problem()
        if problem:
            raise ValueError(f"{where} {problem}")
        rows.append(row)
    return rows, end, schema == newest


def _schema_of_file(
    path: Path, header: Sequence[str], lines: Sequence[Sequence[str]], newest: int
) -> int:
    place = header.index("schema")
    versions = {line[place] for line in lines if len(line) == len(header)}
    known = {str(version) for version in range(1, newest + 1)}
    if versions - known or len(versions) > 1:
        raise ValueError(
            f"CSV: {str(path)!r} has schema version {', '.join(sorted(versions))}, this pkm-perf "
            f"reads versions up to {newest}; give another --output or move the file away"
        )
    return int(versions.pop()) if versions else newest


def _end_of_records(data: bytes) -> int:
    """Where the last whole record ends: at a line's end outside of quotes."""
    end = start = quotes = 0
    while (line_end := data.find(b"\n", start)) >= 0:
        quotes += data.count(b'"', start, line_end)
        start = line_end + 1
        if quotes % 2 == 0:
            end = start
    return end


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in `folder`, where the system has such locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have none: then processes must not share a folder.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
