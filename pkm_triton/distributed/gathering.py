"""Gradients of all ranks on every rank: those of rows, and those kept as their factors.

Of a gradient only what was read is sent, never a table. All ranks take part in every call, also
those that have read nothing, and end with the same bits.
"""

import torch
from torch import Tensor, distributed

from pkm_triton._backend import implementation
from pkm_triton.gradients import FactoredGradient, Reads, rows_and_values

Group = distributed.ProcessGroup | None


def sizes_of_all(sizes: list[int], device: torch.device, group: Group) -> list[list[int]]:
    """The sizes of each rank; the host waits for them."""
    mine = torch.tensor(sizes, dtype=torch.int64, device=device)
    all_ = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(all_, mine, group=group)
    return torch.stack(all_).tolist()


def _gather(x: Tensor, counts: list[int], group: Group) -> list[Tensor]:
    """`x` [M, ...] of each rank, M being as `counts` says."""
    most = max(counts)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: x.shape[0]] = x
    # As bytes, which every kind of process group sends, of whatever dtype.
    flat = padded.view(-1).view(torch.uint8)
    parts = [torch.empty_like(flat) for _ in counts]
    distributed.all_gather(parts, flat, group=group)
    shaped = [part.view(x.dtype).view(padded.shape) for part in parts]
    return [part[:count] for part, count in zip(shaped, counts, strict=True)]


def mean_sparse(grad: Tensor | None, table: Tensor, group: Group = None) -> Tensor:
    """The mean of all ranks' sparse gradients of a table [K, d_v], coalesced; None is zero."""
    if grad is None:
        rows, grad_rows = _nothing(table, torch.int32)[:, 0], _nothing(table)
    else:
        rows, grad_rows = rows_and_values(grad)
    counts = [size for (size,) in sizes_of_all([rows.shape[0]], table.device, group)]
    total = sum(counts)
    if total > 0:
        slots = torch.cat(_gather(rows.to(torch.int32), counts, group)).view(total, 1)
        grads = torch.cat(_gather(grad_rows, counts, group))
        weights = torch.full((total, 1), 1 / len(counts), dtype=_wide(table), device=table.device)
        # Rows that several ranks have read are summed in the ranks' order.
        functions = implementation(table, weights)
        rows, grad_rows, _ = functions.gather_values_backward_sparse(
            grads, table, slots, weights, False
        )
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), grad_rows, table.shape, is_coalesced=True, check_invariants=False
    )


def mean_factored(
    grad: FactoredGradient | None, table: Tensor, group: Group = None
) -> FactoredGradient:
    """The mean of all ranks' factored gradients of a table, as the reads of all; None is zero."""
    reads = (grad if grad is not None else FactoredGradient(table, [])).merged()
    sizes = sizes_of_all(list(reads.slots.shape), table.device, group)
    tokens, width = [size[0] for size in sizes], max(size[1] for size in sizes)
    if max(tokens) == 0 or width == 0:
        return FactoredGradient(table, [])
    missing = (0, width - reads.slots.shape[1])
    slots = _gather(torch.nn.functional.pad(reads.slots, missing), tokens, group)
    # In one dtype on all ranks, whether they have read anything or not.
    weights = torch.nn.functional.pad(reads.weights.to(_wide(table)), missing)
    weights = _gather(weights, tokens, group)
    scaled = reads.grad_output.to(table.dtype) / len(sizes)
    grads = _gather(scaled, tokens, group)
    parts = zip(slots, weights, grads, sizes, strict=True)
    return FactoredGradient(
        table,
        [
            Reads(s[:, :read].contiguous(), w[:, :read].contiguous(), g)
            for s, w, g, (count, read) in parts
            if count > 0 and read > 0
        ],
    )


def _wide(table: Tensor) -> torch.dtype:
    return torch.promote_types(table.dtype, torch.float32)


def _nothing(table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return table.detach().new_empty(0, table.shape[1], dtype=dtype)
