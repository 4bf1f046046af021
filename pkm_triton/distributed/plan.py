"""How large a memory fits on how many ranks, and how it is best spread.

Bytes of a rank that has K_r rows and d_r columns, of s bytes an element; T tokens a rank, T_all of
all ranks; R reads a token:

    parameters  K_r · d_r · s
    gradient    dense: as the parameters; sparse: rows read · (8 + d_r · s);
                factored: T_all · (R · 8 + d_r · s)
    state       what the optimiser keeps of an element, and of a row
    working     T_all · (R · 8 + 2 · d_r · s), and while training R · 24 more, to sort reads by row

Replicas read their own tokens alone; they then hold the gradient of all ranks once more, and that
of their own reads twice.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pkm_triton._checks import (
    FLOATING_DTYPES,
    MAX_SLOTS,
    SparseGrad,
    check_choice,
    check_integer,
    check_positive,
    check_sparse_grad,
)
from pkm_triton.ops import gather_values

from .collective_bytes import Read, of_replicas, of_shards
from .layouts import Cut, cut

# A read of fewer bytes takes a GPU as long.
LINE_BYTES = 128


@dataclass(frozen=True)
class LayoutPlan:
    """What a layout takes of every rank: of the one that has most.

    Attributes:
        layout, ranks: as `shard_memory` and `traffic` take them.
        parameter_bytes, gradient_bytes, state_bytes, working_bytes: memory; those of the gradient
            and working memory are estimates from above.
        sent_bytes: sent in a forward pass and, in training, a backward pass.
        fits: whether the memory suffices, and every rank gets a part.
    """

    layout: str | tuple[str, str]
    ranks: int | tuple[int, int]
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    working_bytes: int
    sent_bytes: int
    fits: bool

    @property
    def total_bytes(self) -> int:
        """Memory of a rank."""
        memory = self.parameter_bytes, self.gradient_bytes, self.state_bytes, self.working_bytes
        return sum(memory)


@dataclass(frozen=True)
class Plan:
    """The layouts there are for a memory; printed as a table.

    Columns are cut into parts of at least 128 bytes: a smaller one takes a GPU as long to read.

    Attributes:
        num_slots, value_dim, world, memory_per_rank: as given.
        layouts: what each takes.
        best: of those that fit, the one that sends least; None if none does.
        max_slots: the largest number of slots for which one fits; at most 2³¹ - 1.
    """

    num_slots: int
    value_dim: int
    world: int
    memory_per_rank: float
    layouts: tuple[LayoutPlan, ...]
    best: LayoutPlan | None
    max_slots: int

    @property
    def fits(self) -> bool:
        """Whether there is a layout that fits."""
        return self.best is not None

    def __str__(self) -> str:
        """A line a layout, in GB (10⁹ bytes) a rank."""
        lines = [
            "| layout | ranks | parameters | gradient | optimiser | working | GB a rank | sent "
            "| fits |",
            "|---|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for each in self.layouts:
            sizes = (
                each.parameter_bytes, each.gradient_bytes, each.state_bytes, each.working_bytes,
                each.total_bytes, each.sent_bytes,
            )  # fmt: skip
            cells = " | ".join(f"{size / 1e9:.2f}" for size in sizes)
            name = each.layout if isinstance(each.layout, str) else " × ".join(each.layout)
            ranks = each.ranks if isinstance(each.ranks, int) else " × ".join(map(str, each.ranks))
            fits = "best" if each is self.best else "yes" if each.fits else "no"
            lines.append(f"| {name} | {ranks} | {cells} | {fits} |")
        best = "no layout fits" if self.best is None else f"best: {self.best.layout!r}"
        subkeys = math.isqrt(self.max_slots)
        lines.append(
            f"\n{self.num_slots:,} slots of width {self.value_dim:,} on {self.world:,} ranks of "
            f"{self.memory_per_rank / 1e9:g} GB: {best}. At most {self.max_slots:,} slots fit, "
            f"{subkeys:,} sub-keys a codebook, {self.max_slots * self.value_dim:,} parameters."
        )
        return "\n".join(lines)


def plan(
    num_slots: int,
    value_dim: int,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None,
    world: int,
    memory_per_rank: float,
    *,
    tokens: int = 8192,
    reads: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    sparse_grad: SparseGrad = "factored",
) -> Plan:
    """Whether a memory fits on so many ranks, in which layout, and what of every rank it takes.

    Of the table of values alone; keys, queries and the rest of a model are on every rank, and
    `memory_per_rank` is what they leave. Needs no process group, and no memory.

    Args:
        num_slots: K.
        value_dim: d_v.
        optimizer: makes it from a list of parameters, such as `pkm.optim.SparseAdam`, or with
            options `functools.partial(pkm.optim.SparseAdam, rounding="master")`. What it keeps is
            found by a step on a small table. None: no training.
        world: P, the ranks of the mesh.
        memory_per_rank: bytes, such as 80e9.
        tokens: T, of a rank in one call.
        reads: R = H · k, of a token.
        dtype: of the values.
        sparse_grad: the form of the values' gradient.

    Raises:
        TypeError: if a number is no integer, or optimizer cannot be called.
        ValueError: if a number is out of range, dtype or sparse_grad unknown, or the optimizer does
            not take such a gradient.
    """
    check_integer("num_slots", num_slots, 1)
    if num_slots > MAX_SLOTS:
        raise ValueError(f"num_slots is {num_slots}, but at most {MAX_SLOTS} are allowed")
    check_integer("value_dim", value_dim, 1)
    check_integer("world", world, 1)
    check_positive("memory_per_rank", memory_per_rank)
    check_integer("tokens", tokens, 0)
    check_integer("reads", reads, 1)
    check_choice("dtype", dtype, FLOATING_DTYPES)
    check_sparse_grad(sparse_grad)
    kept = None
    if optimizer is not None:
        if not callable(optimizer):
            raise TypeError(f"optimizer must make an optimiser, or be None, not {optimizer!r}")
        kept = _kept(optimizer, dtype, sparse_grad)
    weight_bytes = 8 if dtype == torch.float64 else 4
    counts = [tokens] * world

    read = Read((num_slots, value_dim), dtype.itemsize, reads, weight_bytes, sparse_grad)

    def planned(slots: int) -> list[LayoutPlan]:
        of_size = read._replace(shape=(slots, value_dim))
        return [
            _layout_plan(layouts, mesh, of_size, counts, kept, memory_per_rank)
            for layouts, mesh in _candidates(world, value_dim, dtype.itemsize)
        ]

    layouts = [
        dataclasses.replace(each, sent_bytes=_sent(each, read, counts, kept is not None))
        for each in planned(num_slots)
    ]
    fitting = [each for each in layouts if each.fits]
    best = min(fitting, key=lambda each: each.sent_bytes, default=None)
    low, high = 0, MAX_SLOTS
    while low < high:
        middle = (low + high + 1) // 2
        fits = any(each.fits for each in planned(middle))
        low, high = (middle, high) if fits else (low, middle - 1)
    return Plan(num_slots, value_dim, world, memory_per_rank, tuple(layouts), best, low)


def _candidates(
    world: int, value_dim: int, itemsize: int
) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Layouts and meshes; with two dimensions the columns are as many as leave whole lines."""
    yield ("replicate",), (world,)
    line = min(LINE_BYTES, value_dim * itemsize)
    divisors = [n for n in range(2, world + 1) if world % n == 0]
    wide = [n for n in divisors if value_dim // n * itemsize >= line]
    if world in wide:
        yield ("columns",), (world,)
    if world > 1:
        yield ("rows",), (world,)
    inner = [n for n in wide if n < world]
    if inner:
        yield ("rows", "columns"), (world // inner[-1], inner[-1])


def _layout_plan(
    layouts: tuple[str, ...],
    mesh: tuple[int, ...],
    read: Read,
    counts: list[int],
    kept: tuple[float, float] | None,
    memory: float,
) -> LayoutPlan:
    pieces = cut(read.shape, layouts, mesh)
    gathered = sum(counts)
    alone = counts[0] if layouts == ("replicate",) else gathered
    rows = max(stop - start for start, stop in pieces.rows)
    width = max(stop - start for start, stop in pieces.columns)
    row = width * read.itemsize
    gradient = state = 0
    working = alone * (read.reads * 8 + 2 * row)
    if kept is not None:
        held = {
            False: rows * row,
            True: min(rows, gathered * read.reads) * (8 + row),
            "factored": gathered * (read.reads * 8 + row),
        }
        gradient = held[read.sparse_grad]
        state = math.ceil(rows * (width * kept[0] + kept[1]))
        working += alone * read.reads * 24
        if layouts == ("replicate",) and len(counts) > 1:
            working += max(gradient, _gathered_rows(read, counts, row))
            working += 2 * alone * (read.reads * 8 + row)
    total = rows * row + gradient + state + working
    return LayoutPlan(
        layout=layouts[0] if len(layouts) == 1 else (layouts[0], layouts[1]),
        ranks=mesh[0] if len(mesh) == 1 else (mesh[0], mesh[1]),
        parameter_bytes=rows * row,
        gradient_bytes=gradient,
        state_bytes=state,
        working_bytes=working,
        sent_bytes=0,
        fits=total <= memory and _all_have_some(pieces),
    )


def _sent(layout: LayoutPlan, read: Read, counts: list[int], training: bool) -> int:
    if layout.layout == "replicate":
        collectives = of_replicas("", [read], counts)
    else:
        layouts = (layout.layout,) if isinstance(layout.layout, str) else layout.layout
        mesh = (layout.ranks,) if isinstance(layout.ranks, int) else layout.ranks
        collectives = of_shards("", read, cut(read.shape, layouts, mesh), counts)
    counted = [c.sent for c in collectives if training or c.phase == "forward"]
    return max(map(sum, zip(*counted, strict=True)), default=0)


def _gathered_rows(read: Read, counts: list[int], row: int) -> int:
    """The rows of all ranks' sparse gradients, before those that are the same are added up."""
    if read.sparse_grad is not True:
        return 0
    return sum(min(read.shape[0], count * read.reads) for count in counts) * (4 + row)


def _all_have_some(pieces: Cut) -> bool:
    return all(start < stop for start, stop in (*pieces.rows, *pieces.columns))


def _kept(optimizer: Any, dtype: torch.dtype, sparse_grad: SparseGrad) -> tuple[float, float]:
    """Bytes of state that an optimiser keeps of an element and of a row, once it has stepped."""
    rows, width = 16, 8
    table = nn.Parameter(torch.zeros(rows, width, dtype=dtype))
    with torch.enable_grad():
        slots, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
        gather_values(table, slots, weights, sparse_grad=sparse_grad).sum().backward()
    try:
        made = optimizer([table])
        made.step()
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"optimizer {optimizer!r} does not step {dtype} values with sparse_grad="
            f"{sparse_grad!r}: {error}"
        ) from error
    elements = of_rows = 0.0
    for state in made.state[table].values():
        if isinstance(state, torch.Tensor) and state.numel() == rows * width:
            elements += state.itemsize
        elif isinstance(state, torch.Tensor) and state.shape[:1] == (rows,):
            of_rows += state.nbytes / rows
    return elements, of_rows
