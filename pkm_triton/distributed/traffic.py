"""What the memories of a model send between ranks (see `collective_bytes`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pkm_triton._checks import check_integer
from pkm_triton._layer_checks import check_module
from pkm_triton._optimizer_options import check_flag
from pkm_triton.experts import ProductKeyExperts
from pkm_triton.memory import _KeyValueMemory

from .collective_bytes import Collective, Read, of_replicas, of_shards
from .layouts import Layout, check_layouts, check_parts, cut


@dataclass(frozen=True)
class Traffic:
    """The collectives of a forward and a backward pass, in order; printed as a table.

    A gather counts as the rank's part sent to each other rank, and an all-reduce as a ring's:
    twice (P-1) / P of the tensor.
    """

    collectives: tuple[Collective, ...]

    def sent(self, rank: int = 0, phase: str | None = None) -> int:
        """Bytes that a rank sends, in "forward", "backward" or both."""
        return sum(c.sent[rank] for c in self.collectives if phase in (None, c.phase))

    def received(self, rank: int = 0, phase: str | None = None) -> int:
        """Bytes that a rank receives."""
        return sum(c.received[rank] for c in self.collectives if phase in (None, c.phase))

    def __str__(self) -> str:
        """The most bytes of any rank, a line a collective, and in all."""
        lines = [
            "| layer | pass | collective | of | sent | received |",
            "|---|---|---|---|---:|---:|",
        ]
        lines += [
            f"| {c.layer or 'model'} | {c.phase} | {c.collective} | {c.what} "
            f"| {max(c.sent):,} | {max(c.received):,} |"
            for c in self.collectives
        ]
        ranks = range(len(self.collectives[0].sent))
        for phase in ("forward", "backward"):
            sent = max(self.sent(rank, phase) for rank in ranks)
            received = max(self.received(rank, phase) for rank in ranks)
            lines.append(f"| all | {phase} | | | {sent:,} | {received:,} |")
        return "\n".join(lines)


def traffic(
    model: nn.Module,
    tokens: int | Sequence[int],
    ranks: int | tuple[int, int],
    layout: Layout | Sequence[Layout] = "columns",
    *,
    equal_tokens: bool = False,
    narrow_weights: bool = False,
    rows_read: Sequence[int] | None = None,
) -> Traffic:
    """Bytes that the memories of a model send in a forward and a backward pass, by formula.

    Needs no process group. The other arguments are those of `shard_memory`. Counted is a pass in
    which weights and values get gradients; what `average_gradients` or FSDP2 sends is not.

    Args:
        model: any module with memories, sharded or not; the meta device will do.
        tokens: of each call of a layer, on every rank; a sequence for those of each rank.
        ranks: P, or the shape of a mesh of two dimensions.
        layout: as `shard_memory` takes it.
        equal_tokens: likewise.
        narrow_weights: likewise.
        rows_read: of replicas with sparse gradients: how many different rows of a table each rank
            reads. By default as many as it may: all its reads, at most K.

    Raises:
        TypeError: if model is no module, a number no integer, or a flag no bool.
        ValueError: if a number is out of range, the layout unknown or not fit for the ranks, or
            what `shard_memory` would refuse of the model.
    """
    check_module("model", model)
    check_flag("equal_tokens", equal_tokens)
    check_flag("narrow_weights", narrow_weights)
    sizes = ranks if isinstance(ranks, (tuple, list)) else (ranks,)
    mesh = [check_integer("ranks", size, 1) for size in sizes]
    layouts = check_layouts(layout, len(mesh))
    count = mesh[0] * mesh[-1] if len(mesh) == 2 else mesh[0]
    counts = _each("tokens", tokens, count)
    if equal_tokens and len(set(counts)) > 1:
        raise ValueError(f"equal_tokens is True, but tokens is {tokens}")
    memories = {n: m for n, m in model.named_modules() if isinstance(m, _KeyValueMemory)}
    if not memories:
        raise ValueError("model has no memory")
    most = None if rows_read is None else _each("rows_read", rows_read, count)
    if most is not None and layouts != ("replicate",):
        raise ValueError(f"rows_read is of replicas alone, but layout is {layout!r}")
    if layouts == ("replicate",):
        return Traffic(tuple(_all_replicas(memories, counts, most)))
    forward: list[Collective] = []
    backward: list[Collective] = []
    for name, layer in memories.items():
        if isinstance(layer, ProductKeyExperts):
            raise ValueError(
                f"memory {name!r} is of ProductKeyExperts, which can be replicated alone"
            )
        check_parts(name, layer.values.shape, layouts, mesh)
        pieces = cut((layer.values.shape[0], layer.values.shape[1]), layouts, mesh)
        of_layer = of_shards(
            name, read_of(layer, layer.values), pieces, counts, equal_tokens, narrow_weights
        )
        forward += [each for each in of_layer if each.phase == "forward"]
        backward = [*(each for each in of_layer if each.phase == "backward"), *backward]
    return Traffic((*forward, *backward))


def _each(name: str, given: int | Sequence[int], ranks: int) -> list[int]:
    if not isinstance(given, (tuple, list)):
        return [check_integer(name, given, 0)] * ranks  # pyright: ignore[reportArgumentType]
    if len(given) != ranks:
        raise ValueError(f"{name} has {len(given)} numbers, but there are {ranks} ranks")
    return [check_integer(f"{name}[{rank}]", each, 0) for rank, each in enumerate(given)]


def _all_replicas(
    memories: dict[str, _KeyValueMemory], counts: list[int], rows_read: list[int] | None
) -> list[Collective]:
    tables: dict[int, tuple[list[str], list[Read]]] = {}
    for name, layer in memories.items():
        for table in layer.tables:
            names, users = tables.setdefault(id(table), ([], []))
            names.append(name)
            users.append(read_of(layer, table))
    found = [of_replicas(", ".join(n), users, counts, rows_read) for n, users in tables.values()]
    return [collective for of_table in reversed(found) for collective in of_table]


def read_of(layer: _KeyValueMemory, table: Any) -> Read:
    """How a layer reads one of its tables."""
    keys = getattr(layer, layer.keys_name)
    weight_bytes = 8 if keys.dtype == torch.float64 else 4
    reads = layer.heads * layer.top_k
    return Read(tuple(table.shape), table.itemsize, reads, weight_bytes, layer.sparse_grad)
