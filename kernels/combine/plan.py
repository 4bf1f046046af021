"""How candidates are combined: the shape the kernels are compiled for, and the pairs of ranks."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..chip import register_bound
from ..select.plan import Plan, power_of_two

# The most of the best that are sorted in registers; more are found in turns.
MOST_SORTED = 512


class CombineShape(NamedTuple):
    """What the kernels that combine are compiled for.

    rows: tokens of a program. top: of the best, found at a time. splits: lists of a row sorted at
    once. list_rows: of the lists. in_turns: whether more than `top` are wanted.
    """

    rows: int
    top: int
    splits: int
    list_rows: int
    in_turns: bool


def choose_combine_shape(plan: Plan, top_k: int) -> CombineShape:
    """The shape for the lists of a plan."""
    top = max(16, min(power_of_two(top_k), MOST_SORTED))
    few = plan.shape.rows == 16
    # What one warp holds; interpreted programs take the longer for their number alone.
    rows = max(1, min(8, 128 // top)) if not triton.knobs.runtime.interpret else 16
    return CombineShape(
        rows=1 if few else rows,
        top=top,
        # As many as fill the registers of some warps.
        splits=max(1, min(8, 512 // (2 * top))) if few else 1,
        list_rows=plan.shape.rows,
        in_turns=top_k > top,
    )


def options(shape: CombineShape, halves: int, device: torch.device) -> dict[str, int | bool]:
    """The compiler's options, for programs of so many lists a token."""
    elements = halves * shape.rows * shape.splits * 2 * shape.top
    # One warp exchanges without memory; of several a thread has eight elements.
    warps = 1 if elements <= 512 else min(16, elements // 256)
    # Enough not to spill; with none given the compiler takes fewer and does.
    registers = register_bound(device, 96 if warps == 1 else 128)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, **registers}


def rank_pairs(top_k: int, num_subkeys: int, device: torch.device) -> Tensor:
    """The pairs of ranks (a, b) that can be among the best sums, each as a << 16 | b, int32.

    Counted from 1, a pair is beaten or equalled by the a·b - 1 pairs whose ranks are no worse in
    both halves, so only those with a·b <= top_k matter. Where the best are found at once, not in
    turns, without those of a = 1 or b = 1, which need no table.
    """
    key = (top_k, num_subkeys, device)
    found = _kept.get(key)
    if found is not None:
        return found
    if device.type != "cuda":
        found = _make_rank_pairs(*key)
    elif torch.cuda.is_current_stream_capturing():
        # Memory of a graph must not outlive it.
        return _make_rank_pairs(*key)
    else:
        # What a thread allocates while torch warms up for a graph is memory of that graph, too: a
        # thread of its own has none such.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(_make_for_all_streams, *key).result()
    _kept[key] = found
    return found


# Kept for good: a stream may still read what was evicted.
_kept: dict[tuple[int, int, torch.device], Tensor] = {}


def _make_for_all_streams(top_k: int, num_subkeys: int, device: torch.device) -> Tensor:
    """`rank_pairs`, waited for: one stream does not wait for what another makes."""
    with torch.cuda.device(device):
        pairs = _make_rank_pairs(top_k, num_subkeys, device)
        made = torch.cuda.Event()
        made.record()
        made.synchronize()
    return pairs


def _make_rank_pairs(top_k: int, num_subkeys: int, device: torch.device) -> Tensor:
    skip = 0 if top_k > MOST_SORTED else 1
    per_half = min(top_k, num_subkeys)
    counts = [min(top_k // (a + 1), per_half) - skip for a in range(skip, per_half)]
    # On the device, for a copy from the host would wait for it.
    a = torch.arange(skip, per_half, device=device)
    counts_there = (top_k // (a + 1)).clamp(max=per_half) - skip
    ends = counts_there.cumsum(0)
    pair = torch.arange(sum(counts), device=device)
    row = torch.searchsorted(ends, pair, right=True)
    column = pair - (ends - counts_there)[row]
    return ((row + skip) << 16 | (column + skip)).to(torch.int32)


def programs(num_tokens: int, heads: int, shape: CombineShape) -> tuple[int]:
    """The grid of the kernels that combine."""
    return (triton.cdiv(num_tokens, shape.rows) * heads,)
