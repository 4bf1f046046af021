"""What the ranks of a memory send each other, by formula.

P ranks; T tokens a rank, M the most of any; R = H · k reads a token; K slots; d_v columns, of which
a rank has d_r; s bytes an element of the table, w of a weight. Bytes that each rank sends, and
with equally many tokens receives:

    sharded    forward   slots                    (P-1) · M · R · 4
                         weights                  (P-1) · M · R · w   (2 with narrow_weights)
                         sums                     (P-1) · T · d_r · s
               backward  gradient of sums         as the sums
                         gradient of weights      (P-1) · T · R · w
    replicate  backward  dense: all-reduce        2 · (P-1) / P · K · d_v · s
                         sparse: rows             (P-1) · rows read · (4 + d_v · s)
                         factored: reads          (P-1) · M · (R · (4 + w) + d_v · s)

and 32 bytes (8 or 16 with replicas) to every other rank where numbers of tokens, or rows, are
compared first. Nothing but a dense gradient of replicas grows with K.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pkm_triton._checks import check_integer
from pkm_triton._layer_checks import check_module
from pkm_triton._optimizer_options import check_flag
from pkm_triton.experts import ProductKeyExperts
from pkm_triton.memory import _KeyValueMemory

from .layouts import Layout, check_layouts, check_parts, cut


@dataclass(frozen=True)
class Collective:
    """One collective of a pass.

    Attributes:
        layer: the name of the memory; of several that share a table of replicas, all.
        phase: "forward" or "backward".
        collective: "all_gather", "all_to_all" or "all_reduce".
        what: what is sent.
        sent: bytes that each rank sends to others, by rank.
        received: bytes that each rank receives from others.
    """

    layer: str
    phase: str
    collective: str
    what: str
    sent: tuple[int, ...]
    received: tuple[int, ...]


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
    memories = {n: m for n, m in model.named_modules() if isinstance(m, _KeyValueMemory)}
    if not memories:
        raise ValueError("model has no memory")
    if layouts == ("replicate",):
        most = None if rows_read is None else _each("rows_read", rows_read, count)
        return Traffic(tuple(_of_replicas(memories, counts, most)))
    forward: list[Collective] = []
    backward: list[Collective] = []
    for name, layer in memories.items():
        if isinstance(layer, ProductKeyExperts):
            raise ValueError(
                f"memory {name!r} is of ProductKeyExperts, which can be replicated alone"
            )
        check_parts(name, layer.values.shape, layouts, mesh)
        of_layer = _of_shards(name, layer, (layouts, mesh), counts, equal_tokens, narrow_weights)
        forward += [each for each in of_layer if each.phase == "forward"]
        backward = [*(each for each in of_layer if each.phase == "backward"), *backward]
    return Traffic((*forward, *backward))


def _each(name: str, given: int | Sequence[int], ranks: int) -> list[int]:
    if not isinstance(given, (tuple, list)):
        return [check_integer(name, given, 0)] * ranks  # pyright: ignore[reportArgumentType]
    if len(given) != ranks:
        raise ValueError(f"{name} has {len(given)} numbers, but there are {ranks} ranks")
    return [check_integer(f"{name}[{rank}]", each, 0) for rank, each in enumerate(given)]


def _of_shards(
    name: str,
    layer: _KeyValueMemory,
    lies: tuple[tuple[str, ...], list[int]],
    counts: list[int],
    equal_tokens: bool,
    narrow_weights: bool,
) -> list[Collective]:
    reads, most = layer.heads * layer.top_k, max(counts)
    values: Any = layer.values
    pieces = cut((values.shape[0], values.shape[1]), *lies)
    weight = 8 if getattr(layer, layer.keys_name).dtype == torch.float64 else 4
    calls = _Calls(name, len(counts))
    if not equal_tokens:
        calls.gather("forward", "numbers of tokens", 4 * 8)
    if most > 0:
        calls.gather("forward", "slots", most * reads * 4)
        calls.gather("forward", "weights", most * reads * (2 if narrow_weights else weight))

    def sums(sender: int, receiver: int) -> int:
        return counts[receiver] * pieces.width(sender) * values.itemsize

    calls.exchange("forward", "sums", sums)
    calls.exchange("backward", "gradient of sums", lambda r, p: sums(p, r))
    calls.exchange("backward", "gradient of weights", lambda _, p: counts[p] * reads * weight)
    return calls.made


def _of_replicas(
    memories: dict[str, _KeyValueMemory], counts: list[int], rows_read: list[int] | None
) -> list[Collective]:
    """Of each table, whose gradient of a pass is averaged once, however many layers share it."""
    made: list[Collective] = []
    tables: dict[int, list[tuple[str, _KeyValueMemory, Any]]] = {}
    for name, layer in memories.items():
        for table in layer.tables:
            tables.setdefault(id(table), []).append((name, layer, table))
    for users in tables.values():
        _, layer, table = users[0]
        layers = [each for _, each, _ in users]
        row = table.shape[1] * table.itemsize
        reads = [count * sum(each.heads * each.top_k for each in layers) for count in counts]
        calls = _Calls(", ".join(name for name, *_ in users), len(counts))
        if not layer.sparse_grad:
            calls.reduce("gradient", table.shape[0] * row)
        elif layer.sparse_grad == "factored":
            width = max(each.heads * each.top_k for each in layers)
            tokens = max(counts) * len(layers)
            calls.gather("backward", "numbers of reads", 2 * 8)
            if tokens > 0:
                calls.gather("backward", "slots", tokens * width * 4)
                calls.gather("backward", "weights", tokens * width * max(4, table.itemsize))
                calls.gather("backward", "gradient of sums", tokens * row)
        else:
            rows = rows_read or [min(table.shape[0], each) for each in reads]
            calls.gather("backward", "numbers of rows", 8)
            if max(rows) > 0:
                calls.gather("backward", "rows read", max(rows) * 4)
                calls.gather("backward", "their gradient", max(rows) * row)
        made = [*calls.made, *made]
    return made


class _Calls:
    """The collectives of a layer among so many ranks, as they come."""

    def __init__(self, layer: str, ranks: int) -> None:
        self.layer, self.ranks = layer, range(ranks)
        self.made: list[Collective] = []

    def gather(self, phase: str, what: str, size: int) -> None:
        self._add(phase, "all_gather", what, lambda *_: size)

    def exchange(self, phase: str, what: str, size: Callable[[int, int], int]) -> None:
        self._add(phase, "all_to_all", what, size)

    def reduce(self, what: str, size: int) -> None:
        moved = (all_reduce_bytes(size, len(self.ranks)),) * len(self.ranks)
        self.made.append(Collective(self.layer, "backward", "all_reduce", what, moved, moved))

    def _add(self, phase: str, name: str, what: str, size: Callable[[int, int], int]) -> None:
        """`size(sender, receiver)` bytes between each two ranks."""
        sent = tuple(sum(size(r, p) for p in self.ranks if p != r) for r in self.ranks)
        received = tuple(sum(size(p, r) for p in self.ranks if p != r) for r in self.ranks)
        self.made.append(Collective(self.layer, phase, name, what, sent, received))


def all_reduce_bytes(size: int, ranks: int) -> int:
    """What each rank sends in an all-reduce of so many bytes, and receives: as in a ring."""
    return 2 * (ranks - 1) * size // ranks
