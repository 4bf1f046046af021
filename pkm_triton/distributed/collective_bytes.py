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

from dataclasses import dataclass
from typing import NamedTuple

from pkm_triton._checks import SparseGrad

from .layouts import Cut


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


class Read(NamedTuple):
    """What is read of a table.

    Attributes:
        shape: [K, d_v] of the whole table.
        itemsize: bytes of an element.
        reads: R, of a token.
        weight_bytes: of the weight of a read.
        sparse_grad: the form of the table's gradient.
    """

    shape: tuple[int, int]
    itemsize: int
    reads: int
    weight_bytes: int
    sparse_grad: SparseGrad


def of_shards(
    name: str,
    read: Read,
    pieces: Cut,
    counts: list[int],
    equal_tokens: bool = True,
    narrow_weights: bool = False,
) -> list[Collective]:
    """The collectives of a layer whose table is spread."""
    ranks, most = range(len(counts)), max(counts)
    calls = _Calls(name, len(counts))
    if not equal_tokens:
        calls.gather("forward", "numbers of tokens", 4 * 8)
    if most > 0:
        weight_bytes = 2 if narrow_weights else read.weight_bytes
        calls.gather("forward", "slots", most * read.reads * 4)
        calls.gather("forward", "weights", most * read.reads * weight_bytes)
    widths = [pieces.width(rank) * read.itemsize for rank in ranks]
    calls.exchange("forward", "sums", widths, counts)
    calls.exchange("backward", "gradient of sums", counts, widths)
    weights = [count * read.reads * read.weight_bytes for count in counts]
    calls.exchange("backward", "gradient of weights", [1 for _ in ranks], weights)
    return calls.made


def of_replicas(
    name: str, users: list[Read], counts: list[int], rows_read: list[int] | None = None
) -> list[Collective]:
    """Those of a table that every rank has: its gradient is averaged once, whoever shares it."""
    table, together = users[0], sum(each.reads for each in users)
    row = table.shape[1] * table.itemsize
    calls = _Calls(name, len(counts))
    if not table.sparse_grad:
        calls.reduce("gradient", table.shape[0] * row)
    elif table.sparse_grad == "factored":
        width = max(each.reads for each in users)
        tokens = max(counts) * len(users)
        calls.gather("backward", "numbers of reads", 2 * 8)
        if tokens > 0:
            calls.gather("backward", "slots", tokens * width * 4)
            calls.gather("backward", "weights", tokens * width * max(4, table.itemsize))
            calls.gather("backward", "gradient of sums", tokens * row)
    else:
        rows = rows_read or [min(table.shape[0], count * together) for count in counts]
        calls.gather("backward", "numbers of rows", 8)
        if max(rows) > 0:
            calls.gather("backward", "rows read", max(rows) * 4)
            calls.gather("backward", "their gradient", max(rows) * row)
    return calls.made


class _Calls:
    """The collectives of a layer among so many ranks, as they come."""

    def __init__(self, layer: str, ranks: int) -> None:
        self.layer, self.ranks = layer, range(ranks)
        self.made: list[Collective] = []

    def gather(self, phase: str, what: str, size: int) -> None:
        self._add(phase, "all_gather", what, [(len(self.ranks) - 1) * size] * len(self.ranks))

    def reduce(self, what: str, size: int) -> None:
        moved = all_reduce_bytes(size, len(self.ranks))
        self._add("backward", "all_reduce", what, [moved] * len(self.ranks))

    def exchange(self, phase: str, what: str, sender: list[int], receiver: list[int]) -> None:
        """Between two ranks, the product of what the sender and the receiver say."""
        of_senders, of_receivers = sum(sender), sum(receiver)
        sent = [sender[r] * (of_receivers - receiver[r]) for r in self.ranks]
        received = [receiver[r] * (of_senders - sender[r]) for r in self.ranks]
        self._add(phase, "all_to_all", what, sent, received)

    def _add(
        self,
        phase: str,
        name: str,
        what: str,
        sent: list[int],
        received: list[int] | None = None,
    ) -> None:
        moved = tuple(sent), tuple(sent if received is None else received)
        self.made.append(Collective(self.layer, phase, name, what, *moved))


def all_reduce_bytes(size: int, ranks: int) -> int:
    """What each rank sends in an all-reduce of so many bytes, and receives: as in a ring."""
    return 2 * (ranks - 1) * size // ranks
