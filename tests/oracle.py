"""Brute force in float64: the definitions, with nothing clever in them."""

import torch
from torch import Tensor


def all_product_scores(query: Tensor, subkeys: Tensor) -> Tensor:
    """The scores of all N² slots, [T, H, N²], in float64 (paper equations 1 and 4)."""
    first, second = query.double().chunk(2, dim=-1)
    rows = torch.einsum("thd,hnd->thn", first, subkeys[:, 0].double())
    columns = torch.einsum("thd,hnd->thn", second, subkeys[:, 1].double())
    return (rows[..., :, None] + columns[..., None, :]).flatten(-2)


def all_flat_scores(query: Tensor, keys: Tensor) -> Tensor:
    """The scores of all K keys, [T, H, K], in float64 (paper equation 1)."""
    return torch.einsum("thd,hkd->thk", query.double(), keys.double())


def gather(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums of rows, [T, d_v], in float64 (paper equation 3)."""
    return torch.einsum("trd,tr->td", values.double()[slots.long()], weights.double())


def sample(values: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The products of tokens with the rows they read, [T, R], in float64."""
    return torch.einsum("trd,td->tr", values.double()[slots.long()], x.double())


def scatter(slots: Tensor, weights: Tensor, x: Tensor, num_slots: int) -> Tensor:
    """The sums of weighted tokens by the row they read, [K, d], in float64."""
    parts = torch.einsum("tr,td->trd", weights.double(), x.double()).flatten(0, 1)
    table = torch.zeros(num_slots, x.shape[1], dtype=torch.float64)
    return table.index_add_(0, slots.long().flatten(), parts)


def assert_selects_exactly(scores: Tensor, slots: Tensor, all_scores: Tensor) -> None:
    """`scores` are those of the best slots of `all_scores`, in order; `slots` have them, once each.

    For inputs whose scores are exact in float32 (small integers, say).
    """
    assert_distinct(slots, all_scores.shape[-1])
    best = all_scores.topk(scores.shape[-1], dim=-1).values
    torch.testing.assert_close(scores.double(), best, rtol=0, atol=0)
    torch.testing.assert_close(all_scores.gather(-1, slots.long()), scores.double(), rtol=0, atol=0)


def assert_distinct(slots: Tensor, num_slots: int) -> None:
    """No slot twice in a query's list, and each a valid one."""
    assert slots.dtype == torch.int32
    ordered = slots.sort(-1).values
    assert ordered.numel() == 0 or (ordered.min() >= 0 and ordered.max() < num_slots)
    assert (ordered.diff(dim=-1) > 0).all()
