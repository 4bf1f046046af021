"""Definitions by brute force in float64, and the one rule for tolerances."""

from collections.abc import Callable

import torch
from torch import Tensor

from .outcome import FAIL, PASS, Outcome

Terms = Callable[[torch.dtype], Tensor]
"""A formula, computed in the precision given."""


def rounding_floor(oracle: Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may cost: adding 0.3 to the oracle in `dtype` and taking it off again."""
    rounded = oracle.to(dtype)
    return 2 * ((rounded + 0.3 - 0.3) - rounded).double().abs().max().item()


def compare(actual: Tensor, oracle: Tensor, *same_precision: Tensor, note: str = "") -> Outcome:
    """The largest error is at most twice that of PyTorch in the same precision, plus a floor.

    Args:
        actual: what is checked.
        oracle: the same in float64.
        same_precision: the same by plain PyTorch, of the precision that `actual` promises; where
            it may be summed in several orders, once for each, and the worst counts.
        note: says what was compared, where it fails.
    """
    if actual.shape != oracle.shape:
        return Outcome(
            FAIL, note=f"{note} has shape {list(actual.shape)}, not {list(oracle.shape)}"
        )
    if oracle.numel() == 0:
        return Outcome(PASS, 0.0, 0.0)
    # Infinities and NaN must be where the oracle has them; the others are compared by distance.
    finite = oracle.isfinite()
    strange = ~finite & ~((actual.double() == oracle) | (actual.isnan() & oracle.isnan()))
    if strange.any() or not actual[finite].isfinite().all():
        return Outcome(FAIL, note=f"{note}: infinities or NaN are not where they belong".strip())
    actual, oracle = actual.double()[finite], oracle[finite]
    if oracle.numel() == 0:
        return Outcome(PASS, 0.0, 0.0)
    error = (actual - oracle).abs().max().item()
    errors = [(each.double()[finite] - oracle).abs().max().item() for each in same_precision]
    allowed = 2 * max(errors) + rounding_floor(oracle, same_precision[0].dtype)
    passed = error <= allowed
    return Outcome(PASS if passed else FAIL, error, allowed, "" if passed else note)


def worst(outcomes: list[Outcome]) -> Outcome:
    """The first that failed, or the one that came nearest to what is allowed."""
    failed = [outcome for outcome in outcomes if outcome.status != PASS]
    if failed:
        return failed[0]
    return max(outcomes, key=lambda outcome: (outcome.error or 0) / (outcome.allowed or 1))


def product_scores(query: Tensor, subkeys: Tensor, dtype: torch.dtype) -> Tensor:
    """The scores of all N² slots, [T, H, N²] (paper equations 1 and 4).

    NaN in a query or in the sub-keys it meets makes all its scores NaN; opposite infinities make
    -inf: what the ops promise.
    """
    first, second = query.to(dtype).chunk(2, dim=-1)
    rows = torch.einsum("thd,hnd->thn", first, subkeys[:, 0].to(dtype))
    columns = torch.einsum("thd,hnd->thn", second, subkeys[:, 1].to(dtype))
    spoilt = rows.isnan().any(-1) | columns.isnan().any(-1)
    sums = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    sums = torch.where(sums.isnan(), -torch.inf, sums)
    return torch.where(spoilt[..., None], torch.nan, sums)


def flat_scores(query: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The scores of all K keys, [T, H, K] (paper equation 1)."""
    scores = torch.einsum("thd,hkd->thk", query.to(dtype), keys.to(dtype))
    return torch.where(scores.isnan().any(-1, keepdim=True), torch.nan, scores)


def scores_of_slots(query: Tensor, keys: Tensor, slots: Tensor) -> Tensor:
    """The scores of the slots [T, H, k] alone, in the precision of the query; differentiable."""
    heads = torch.arange(query.shape[1], device=query.device)[:, None]
    if keys.ndim == 3:
        return torch.einsum("thd,thkd->thk", query, keys[heads, slots])
    first, second = query.chunk(2, dim=-1)
    rows = keys[:, 0][heads, slots // keys.shape[2]]
    columns = keys[:, 1][heads, slots % keys.shape[2]]
    return torch.einsum("thd,thkd->thk", first, rows) + torch.einsum(
        "thd,thkd->thk", second, columns
    )


def gathered(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The weighted sums of rows, [T, d_v], in the precision of the values (paper equation 3)."""
    return torch.einsum("trd,tr->td", values[slots.long()], weights)


def gather_in_order(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """`gathered`, one read added after the other, as `F.embedding_bag` does."""
    total = values.new_zeros(slots.shape[0], values.shape[1])
    for read in range(slots.shape[1]):
        total += values[slots[:, read].long()] * weights[:, read, None]
    return total


def sample_in_order(values: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """The products [T, R] of tokens with the rows they read, one column after the other."""
    total = values.new_zeros(slots.shape)
    rows = slots.long()
    for column in range(values.shape[1]):
        total += values[:, column][rows] * x[:, column, None]
    return total


def scatter_in_order(slots: Tensor, weights: Tensor, x: Tensor, num_slots: int) -> Tensor:
    """The sums [K, d] of the weighted tokens that read each row."""
    table = x.new_zeros(num_slots, x.shape[1])
    terms = weights[..., None] * x[:, None]
    return table.index_add(0, slots.flatten().long(), terms.flatten(0, 1))
