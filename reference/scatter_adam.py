"""Adam on the rows that were read, from the reads themselves: no gradient of the table is stored.

With S the sparse [T, K] matrix of (slots, weights), R entries a row, the gradient is Sᵀ · G. Here
it is made some rows at a time, used, and forgotten.

Shapes: T tokens, R reads a token, K slots.
    param, exp_avg, exp_avg_sq, master [K, d_v]; grad_output [T, d_v]; slots, weights [T, R]
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sparse_adam import AdamOptions, adam_on_rows


def scatter_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_output: Tensor,
    slots: Tensor,
    weights: Tensor,
    **options: Any,
) -> None:
    """One step of Adam on the rows that were read, in place.

    The same as `gather_values_backward_sparse` and then `sparse_adam`, but that a gradient in half
    precision is not rounded in between.

    Args:
        param: [K, d_v], updated in place.
        exp_avg: [K, d_v], float32 (float64 for float64), updated in place.
        exp_avg_sq: likewise.
        grad_output: [T, d_v], the gradient of the gather's output.
        slots: [T, R], int32. One out of [0, K) is passed over.
        weights: [T, R].
        **options: see `AdamOptions`.
    """
    dtype = exp_avg.dtype
    grad_output = grad_output.to(dtype)
    ordered, order = slots.flatten().sort(stable=True)
    rows, counts = torch.unique_consecutive(ordered, return_counts=True)
    token = order.div(slots.shape[1], rounding_mode="floor").to(torch.int32)
    weight = weights.flatten()[order].to(dtype)
    ends = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    inside = ((rows >= 0) & (rows < param.shape[0])).nonzero().flatten()
    if inside.numel() == 0:
        return
    first, last = int(inside[0]), int(inside[-1]) + 1
    rows, ends = rows[first:last].to(torch.int64), ends[first : last + 1]
    update = adam_on_rows(param, exp_avg, exp_avg_sq, rows.shape[0], AdamOptions(**options))
    bounds = [*ends[:: update.count].tolist(), int(ends[-1])]
    for place, start in enumerate(range(0, rows.shape[0], update.count)):
        some = rows[start : start + update.count]
        first, last = bounds[place : place + 2]
        end = ends[start : start + some.shape[0] + 1] - first
        # A bag a row: it adds up its reads in token order, whatever the number of threads.
        grad = torch.embedding_bag(
            grad_output, token[first:last], end, False, 0, False, weight[first:last], True
        )[0]
        update(some, grad)
