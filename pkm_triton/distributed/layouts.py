"""How tables are cut: which rows and columns each rank of a mesh has."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from pkm_triton._checks import check_choice

Layout = Literal["columns", "rows", "replicate"]
Range = tuple[int, int]


def bounds(size: int, parts: int) -> list[Range]:
    """Where each of `parts` begins and ends, as DTensor's Shard cuts a dimension."""
    step = -(-size // parts)
    return [(min(size, i * step), min(size, i * step + step)) for i in range(parts)]


class Cut(NamedTuple):
    """A table [K, d_v] over the ranks of a mesh.

    Attributes:
        rows: where each part of the rows begins and ends.
        columns: the same of the columns.
        parts: of each rank, in the order of the flat mesh, the part of rows and that of columns.
    """

    rows: list[Range]
    columns: list[Range]
    parts: list[tuple[int, int]]

    def width(self, rank: int) -> int:
        """The columns of a rank."""
        start, stop = self.columns[self.parts[rank][1]]
        return stop - start


def cut(shape: tuple[int, int], layouts: Sequence[str], mesh: Sequence[int]) -> Cut:
    """How a table of that shape lies over a mesh of that shape, with a layout a dimension."""
    sizes = dict(zip(layouts, mesh, strict=True))
    rows = bounds(shape[0], sizes.get("rows", 1))
    columns = bounds(shape[1], sizes.get("columns", 1))
    # Ranks of the flat mesh run over the last dimension first.
    parts = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    if layouts[0] == "columns":
        parts = [(i, j) for j in range(len(columns)) for i in range(len(rows))]
    return Cut(rows, columns, parts)


def check_layouts(layout: Any, dimensions: int) -> tuple[str, ...]:
    """The layout of each dimension of a mesh.

    Raises:
        ValueError: if one is unknown, or they do not fit the dimensions, or each other.
    """
    layouts = tuple(layout) if isinstance(layout, (tuple, list)) else (layout,)
    for each in layouts:
        check_choice("layout", each, get_args(Layout))
    if len(layouts) != dimensions:
        raise ValueError(f"layout is {layout!r}, but mesh has {dimensions} dimensions")
    if len(layouts) == 2 and set(layouts) != {"rows", "columns"}:
        raise ValueError(
            f"layout is {layout!r}, but over two dimensions must be 'rows' and 'columns' in some "
            "order; to replicate shards, pass one dimension of the mesh, and average_gradients "
            "over the other"
        )
    return layouts


def check_parts(name: str, shape: Sequence[int], layouts: Sequence[str], mesh: Sequence[int]):
    """Every rank gets a row, or a column, of the memory of that name.

    Raises:
        ValueError: if one does not.
    """
    for layout, ranks in zip(layouts, mesh, strict=True):
        size = shape[0 if layout == "rows" else 1]
        for rank, (start, stop) in enumerate(bounds(size, ranks)):
            if start == stop and layout != "replicate":
                raise ValueError(
                    f"memory {name!r} has {size} {layout}, which over {ranks} ranks leave rank "
                    f"{rank} none"
                )
