"""One file of tensors that lie over ranks: one rank writes it, and each reads its own part.

A sharded tensor goes block by block to the rank that writes, which has mapped the file: no rank
ever holds more of it than its shard and a block.
"""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from pkm_triton._files import CHECKSUMS, checksum, parts_of, replaced
from pkm_triton._state import is_sharded

from .agreement import agreed, together
from .gathering import Group

BLOCK_BYTES = 1 << 25

# Where a rank's part of a tensor begins, and its shape.
Chunk = tuple[tuple[int, ...], tuple[int, ...]]


def write_sharded_tensors(path: Path, content: Mapping[str, Any], group: Group = None) -> None:
    """As `write_tensors`, of content among which are DTensors; the group's first rank writes.

    All ranks of the group must call, and wait for each other after every block.

    Raises:
        ValueError: on all ranks, if they differ in what they save, or the group lacks ranks that
            have a part of a sharded tensor.
        OSError: on all ranks, if the file cannot be written.
    """
    (_, outline), *parts = parts_of(content)
    agreed(lambda: {"path": str(path), "what is saved": checksum(outline)}, group)
    tensors = {id(part): part for _, part in parts}  # each once, also where several names share it
    chunks = _chunks_of_all([part for part in tensors.values() if is_sharded(part)], group)
    rank = distributed.get_rank(group)
    with contextlib.ExitStack() as stack:
        targets: dict[int, Tensor] = {}

        def begin() -> None:
            if rank == 0:
                names = {CHECKSUMS: torch.zeros(1 + len(parts), dtype=torch.int64)}
                mapped = stack.enter_context(_mapped(path, {**content, **names}))
                _, *there = parts_of(mapped)
                for (_, part), (_, target) in zip(parts, there, strict=True):
                    targets[id(part)] = target
                targets[0] = mapped[CHECKSUMS]

        together(begin, group)
        sums = {}
        for key, part in tensors.items():
            sums[key] = _streamed(part, targets.get(key), chunks.get(key, []), group)
        if rank == 0:
            found = [checksum(outline), *(sums[id(part)] for _, part in parts)]
            targets[0].copy_(torch.tensor(found))
        together(stack.close, group)


def rank_and_ranks(group: Group = None) -> tuple[int, int]:
    """This rank's number, and how many there are."""
    return distributed.get_rank(group), distributed.get_world_size(group)


@torch.no_grad()
def fill(parameter: Any, saved: Tensor) -> None:
    """Copy into a DTensor this rank's part of a tensor that lies in a file."""
    offsets, sizes = _chunk(parameter)
    part = saved[tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))]
    shard = parameter.to_local().view(part.shape)
    if shard.ndim == 0:
        shard.copy_(part)
    for start, stop in _blocks(shard):
        shard[start:stop] = part[start:stop].to(shard.device)


@contextlib.contextmanager
def _mapped(path: Path, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The file's content, of which nothing is there yet: what is written to it goes to the file."""
    with FakeTensorMode():
        stand_ins = {
            id(part): torch.empty(part.shape, dtype=part.dtype)
            for _, part in parts_of(content)
            if is_sharded(part)
        }
    without = tree_map(lambda part: stand_ins.get(id(part), part), dict(content))
    with replaced(path) as (file, temporary):
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(without, file)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            # A disk that has not the space says so here, where it is an error.
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(temporary, map_location="cpu", mmap=True, weights_only=True)
        yield mapped


def _streamed(part: Any, target: Tensor | None, chunks: list[Chunk | None], group: Group) -> int:
    """Bring a tensor to the rank that has its target; there the checksum is returned."""
    if not is_sharded(part):
        if target is None:
            return 0
        target.copy_(part.detach())
        return checksum(target)
    if part.ndim == 0:
        if target is not None:
            target.copy_(part.to_local())
        return 0 if target is None else checksum(target)
    found = 0
    for start, stop in _blocks(part):
        for owner, chunk in enumerate(chunks):
            if chunk is not None:
                _send_rows(part, target, (start, stop), owner, chunk, group)
        if target is not None:
            found = checksum(target[start:stop], found)
        # No rank waits longer than for one block.
        distributed.barrier(group)
    return found


def _send_rows(
    part: Any,
    target: Tensor | None,
    rows: tuple[int, int],
    owner: int,
    chunk: Chunk,
    group: Group,
) -> None:
    """Bring what a rank has of some rows to the target."""
    offsets, sizes = chunk
    low, high = max(rows[0], offsets[0]), min(rows[1], offsets[0] + sizes[0])
    rank = distributed.get_rank(group)
    if low >= high or rank not in (0, owner):
        return
    shard = part.to_local()
    piece = shard.new_empty(high - low, *sizes[1:])
    if rank == owner:
        piece.copy_(shard[low - offsets[0] : high - offsets[0]])
    if owner != 0:
        # As bytes, which every kind of process group sends, of whatever dtype.
        flat = piece.view(-1).view(torch.uint8)
        if rank == owner:
            distributed.send(flat, _global_rank(0, group), group=group)
        else:
            distributed.recv(flat, _global_rank(owner, group), group=group)
    if target is not None:
        ranges = zip(offsets[1:], sizes[1:], strict=True)
        target[(slice(low, high), *(slice(at, at + size) for at, size in ranges))] = piece.cpu()


def _global_rank(rank: int, group: Group) -> int:
    return rank if group is None else distributed.get_global_rank(group, rank)


def _blocks(tensor: Any) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, some at a time."""
    rows = tensor.shape[0] if tensor.ndim else 0
    width = max(1, tensor.numel() * tensor.element_size() // max(1, rows))
    step = max(1, BLOCK_BYTES // width)
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def _chunk(tensor: Any) -> Chunk:
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _chunks_of_all(tensors: list[Any], group: Group) -> dict[int, list[Chunk | None]]:
    """Of each tensor, what each rank has that none before it has."""
    ranks = distributed.get_world_size(group)
    said: list[Any] = [None] * ranks
    distributed.all_gather_object(said, [_chunk(tensor) for tensor in tensors], group=group)
    found: dict[int, list[Chunk | None]] = {}
    for number, tensor in enumerate(tensors):
        chunks: list[Chunk | None] = []
        for rank in range(ranks):
            chunk = said[rank][number]
            chunks.append(None if chunk in chunks else chunk)
        there = sum(torch.Size(sizes).numel() for _, sizes in filter(None, chunks))
        if there != tensor.numel():
            raise ValueError(
                f"the ranks of the group have {there} of the {tensor.numel()} elements of a "
                "sharded tensor: pass a group with all ranks of its mesh"
            )
        found[id(tensor)] = chunks
    return found
