"""Choose, among all rows of a sweep, those that belong into one picture or table."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pkm_triton.perf.records.points import IMPLEMENTATIONS
from pkm_triton.perf.records.sweep_row import POINT_FIELDS, Row

SERIES = ("implementation", "keys")
"""What tells the lines of a picture apart."""

Series = dict[tuple[str, str], list[Row]]
"""Rows in the order of the axis, by implementation and keys."""


def rows_along(rows: Iterable[Row], axis: str, *, pass_name: str, least: int = 2) -> list[Row]:
    """The rows that differ in `axis`, implementation and keys alone.

    Where several sets of rows would do, the one that covers most of the axis is taken (all of them:
    `sets_along`).

    Args:
        rows: rows of a sweep.
        axis: field of `Point` that the picture has on its x axis.
        pass_name: the pass to show.
        least: different values of the axis needed.

    Returns:
        Rows of any status, or an empty list where no set covers `least` values of the axis.
    """
    found = sets_along(rows, axis, pass_name=pass_name, least=least)
    return found[0] if found else []


def sets_along(
    rows: Iterable[Row], axis: str, *, pass_name: str, least: int = 2
) -> list[list[Row]]:
    """All sets of rows as `rows_along` has them, the one that covers most of the axis first."""
    # Values are as wide as tokens unless they are asked to be otherwise.
    tied = axis == "dim"
    shared = [name for name in POINT_FIELDS if name not in (axis, *SERIES, *["value_dim"] * tied)]
    sets: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.pass_name == pass_name and (not tied or row.value_dim == row.dim):
            key = (*(getattr(row, name) for name in shared), *row.circumstances)
            sets.setdefault(key, []).append(row)

    def coverage(found: Sequence[Row]) -> tuple[int, int]:
        return len({getattr(row, axis) for row in found if row.ok}), len(found)

    return [
        sorted(found, key=lambda row: getattr(row, axis))
        for found in sorted(sets.values(), key=coverage, reverse=True)
        if coverage(found)[0] >= least
    ]


def by_series(rows: Iterable[Row]) -> Series:
    """Rows that are `ok`, by implementation and keys."""
    series: Series = {}
    for row in rows:
        if row.ok:
            series.setdefault((row.implementation, row.keys), []).append(row)
    order = [(name, keys) for name in IMPLEMENTATIONS for keys in ("product", "flat")]
    return {key: series[key] for key in order if key in series}


def compared(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Sets of rows that differ in the implementation alone, two or more, by implementation."""
    sets: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.ok:
            neutral = dataclasses.replace(row, implementation=IMPLEMENTATIONS[0])
            sets.setdefault(neutral.key, {})[row.implementation] = row
    return [found for found in sets.values() if len(found) > 1]


def gradient(row: Row) -> str:
    """What kind of gradient the values get, for titles and captions."""
    return f", {'sparse' if row.sparse_grad else 'dense'} gradients" if row.backward else ""


def reliability(rows: Iterable[Row]) -> str:
    """A sentence where some of these times are not to be relied on, else nothing."""
    measured = [row for row in rows if row.ok]
    noted = [row for row in measured if row.remark]
    if not noted:
        return ""
    return f"Not to be relied on: {len(noted)} of {len(measured)} times ({noted[0].remark})."


def describe(row: Row, *left_out: str) -> str:
    """The parameters a set of rows shares, for captions."""
    words = {
        "num_subkeys": f"|C| {row.num_subkeys}",
        "top_k": f"k {row.top_k}",
        "heads": f"{row.heads} heads",
        "dim": f"width {row.dim}",
        "value_dim": f"values {row.value_dim}" if row.value_dim != row.dim else "",
        "query_dim": f"query {row.query_dim} a head",
        "tokens": f"{row.tokens} tokens",
        "query_norm": f"{row.query_norm} norm",
        "dtype": row.dtype,
        "reads": "" if row.reads == "layer" else f"{row.reads} reads",
        "ranks": "" if row.ranks == 1 else f"{row.ranks} ranks, by {row.layout}",
    }
    return ", ".join(text for name, text in words.items() if text and name not in left_out)


def machine(row: Row, *left_out: str) -> str:
    """Device, threads and versions, for captions."""
    threads = ""
    if row.device == "cpu" and "threads" not in left_out:
        threads = f", {row.threads} thread{'s' * (row.threads > 1)}"
    return (
        f"{row.device_name}{threads}; torch {row.torch_version}, "
        f"pkm_triton {row.pkm_triton_version}"
    )


def shared(sets: Mapping[str, Sequence[Row]], *left_out: str) -> str:
    """What `describe` and `machine` say of sets of rows by name: once where that is the same."""
    told = {
        name: f"{describe(rows[0], *left_out)}. {machine(rows[0], *left_out)}."
        for name, rows in sets.items()
    }
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return " ".join(f"{name[0].upper()}{name[1:]}: {text}" for name, text in told.items())


def told_apart(rows: Sequence[Row], *known: str) -> list[str]:
    """The parameters in which rows differ, but for the implementation and those known already."""
    names = [*POINT_FIELDS, "device_name", "seed", "seconds"]
    return [
        name
        for name in names
        if name not in ("implementation", *known) and len({getattr(row, name) for row in rows}) > 1
    ]
