"""Exact top-k of the last dimension, and the scoring precision the lookups share."""

import torch
from torch import Tensor


def scoring_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """float64 if either is float64, else float32: scores are never kept in less."""
    return torch.float64 if torch.float64 in (query.dtype, keys.dtype) else torch.float32


def matmul_full_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, of float32 in float32, whatever `torch.set_float32_matmul_precision` says.

    Takes two matrices, or two batches of them. The reduced precisions that it allows are enough to
    change which slots win. It is a setting of the process, which to change for a moment would reach
    other threads, and they this one: where it allows less, the product is made in float64.
    """
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    backends = torch.backends.cuda if a.is_cuda else torch.backends.mkldnn
    allowed = backends.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]  (missing in stubs)
    if a.dtype == torch.float32 and allowed not in ("none", "ieee"):
        return multiply(a.double(), b.double()).float()
    return multiply(a, b)


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
    if not scores.is_cpu or width < 16 * top_k or scores.numel() < 1 << 16:
        return scores.topk(top_k)
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
