"""Exact top-k of the last dimension, and the scoring precision the lookups share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def scoring_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: scores are never kept in less."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in float32, whatever `torch.set_float32_matmul_precision` says.

    The reduced precisions it allows are enough to change which slots win.
    """
    backends = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backends.matmul  # pyright: ignore[reportAttributeAccessIssue]  (missing in stubs)
    previous = matmul.fp32_precision
    if previous in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def topk_last_dim(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(top_k)`, quicker where a row is many times wider than `top_k`.

    Split a row into groups. The k largest elements lie in the k groups with the largest maxima:
    each of those groups holds an element at least as large as anything outside them. Group
    maxima are one vectorised pass, and `torch.topk` then sees two rows a fraction as wide.

    Args:
        scores: [..., N], any floating dtype; NaN counts as the largest, as in `torch.topk`.
        top_k: 1 <= top_k <= N.

    Returns:
        values [..., top_k], descending, and their indices (int64) in the last dimension.
    """
    width = scores.shape[-1]
    # Measured on CPUs at widths 128 to 4096: below 16 k the gather costs what it saves, and so do
    # the calls where rows are few.
    if scores.device.type != "cpu" or width < 16 * top_k or scores.numel() < 1 << 16:
        return scores.topk(top_k, dim=-1)
    size = 4 if width < 32 * top_k else 8
    num_groups = width // size
    # Group g holds the elements g, g + num_groups, ...: its maximum reduces over a strided
    # dimension, which vectorises; what is left over at the end joins the candidates as it is.
    grouped = scores[..., : size * num_groups].unflatten(-1, (size, num_groups))
    groups = grouped.amax(-2).topk(top_k, dim=-1, sorted=False).indices
    taken = groups.unsqueeze(-2).expand(*groups.shape[:-1], size, top_k)
    candidates = grouped.gather(-1, taken).flatten(-2)
    tail = size * num_groups
    if tail < width:
        candidates = torch.cat([candidates, scores[..., tail:]], dim=-1)
    values, position = candidates.topk(top_k, dim=-1)
    in_groups = position.clamp(max=size * top_k - 1)
    row, column = in_groups.div(top_k, rounding_mode="floor"), in_groups.remainder(top_k)
    indices = row * num_groups + groups.gather(-1, column)
    if tail < width:
        indices = torch.where(position < size * top_k, indices, position + (tail - size * top_k))
    return values, indices
