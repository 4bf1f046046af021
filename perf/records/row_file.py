"""A CSV file of dataclass rows: resumable, of a known schema, written whole at every change."""

import dataclasses
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pandas as pd

from .files import write_whole


class KeyedRow(Protocol):
    """A dataclass of int, str, bool and float fields, `schema` among them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row unique."""
        ...


R = TypeVar("R", bound=KeyedRow)

_CONVERTERS = {
    int: int,
    str: str,
    bool: {"True": True, "False": False}.__getitem__,
    float: lambda text: float(text) if text else math.nan,
}


def columns_of(kind: type[Any]) -> tuple[str, ...]:
    """The header of the CSV: the fields of the dataclass, in order."""
    return tuple(field.name for field in dataclasses.fields(kind))


def schema_of(kind: type[Any]) -> int:
    """The schema version that this code reads and writes: the default of the field `schema`."""
    (schema,) = (field.default for field in dataclasses.fields(kind) if field.name == "schema")
    assert isinstance(schema, int)
    return schema


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read a CSV written by `RowFile`.

    Raises:
        ValueError: there is no such file, it holds other rows, or is of another schema version.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise ValueError(f"CSV: there is no file {str(path)!r}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"CSV: {str(path)!r} cannot be read: {error}") from error
    if "schema" not in table.columns:
        raise ValueError(f"CSV: {str(path)!r} was not written by pkm-perf (no column 'schema')")
    schema = schema_of(kind)
    versions = set(table["schema"]) - {str(schema)}
    if versions:
        raise ValueError(
            f"CSV: {str(path)!r} has schema version {', '.join(sorted(versions))}, this pkm-perf "
            f"reads and writes version {schema}; give another --output or move the file away"
        )
    columns = columns_of(kind)
    if tuple(table.columns) != columns:
        wrong = sorted(set(table.columns) ^ set(columns)) or ["their order"]
        raise ValueError(f"CSV: {str(path)!r} has other columns: {', '.join(wrong)}")
    converters = [_CONVERTERS[field.type] for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    try:
        return [
            kind(*(convert(cell) for convert, cell in zip(converters, cells, strict=True)))
            for cells in table.itertuples(index=False, name=None)
        ]
    except (KeyError, ValueError) as error:
        raise ValueError(f"CSV: {str(path)!r} has a cell that cannot be read: {error}") from error


def rows_to_frame(rows: Iterable[Any], kind: type[Any]) -> pd.DataFrame:
    """One line a row, with the columns of the CSV."""
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=list(columns_of(kind)))


class RowFile(Generic[R]):
    """The rows of a CSV file, which is replaced as a whole whenever a row is added.

    A kill at any moment leaves every row that was added, and no half of one.

    Args:
        path: of the CSV.
        kind: the dataclass of its rows.

    Raises:
        ValueError: the file exists and does not hold such rows.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        self.kind = kind
        rows = read_rows(path, kind) if path.exists() else []
        self._rows = {row.key: row for row in rows}

    @property
    def rows(self) -> list[R]:
        """All rows, in the order in which they were first added."""
        return list(self._rows.values())

    def find(self, key: tuple[Any, ...]) -> R | None:
        """The row of that key, if there is one."""
        return self._rows.get(key)

    def add(self, *rows: R) -> None:
        """Add rows, or replace those with the same key, and write the file."""
        updated = {**self._rows, **{row.key: row for row in rows}}
        text = io.StringIO()
        rows_to_frame(updated.values(), self.kind).to_csv(text, index=False, lineterminator="\n")
        write_whole(self.path, text.getvalue())
        self._rows = updated
