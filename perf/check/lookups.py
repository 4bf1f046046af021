"""Checks of the lookups: the best of all slots, exactly, and the gradients of queries and keys."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pkm_triton as pkm

from .oracle import compare, flat_scores, product_scores, scores_of_slots, worst
from .outcome import FAIL, PASS, Check, Outcome
from .setting import DTYPES, Setting, dtype_name

GROUP = "Lookup"
_ROWS, _SCORES = 32, 2**25
"""Tokens whose scores are made by brute force, and how many scores: more would not fit."""


@dataclass(frozen=True)
class Case:
    """A lookup's sizes. `width` is that of a query, `size` |C| of product keys, K of flat ones."""

    tokens: int
    heads: int
    size: int
    width: int
    top_k: int
    keys: str = "product"

    def __str__(self) -> str:
        name = "|C|" if self.keys == "product" else "K"
        return (
            f"{self.keys} T={self.tokens} H={self.heads} {name}={self.size} d_q={self.width} "
            f"k={self.top_k}"
        )


_LARGE = [
    Case(2048, 4, 512, 256, 32),
    Case(1, 4, 1024, 512, 32),
    Case(300, 3, 200, 66, 33),
    Case(65, 1, 2048, 128, 8),
    Case(17, 8, 128, 64, 128),
    Case(40, 2, 12, 2, 144),
    Case(64, 2, 333, 34, 1),
    Case(128, 2, 4096, 64, 16, "flat"),
    Case(33, 3, 1000, 18, 33, "flat"),
]
_SMALL = [
    Case(3, 1, 16, 8, 4),
    Case(2, 3, 9, 2, 9),
    Case(1, 1, 20, 6, 33),
    Case(5, 2, 50, 6, 5, "flat"),
    Case(3, 1, 20, 4, 20, "flat"),
]


def checks(setting: Setting) -> Iterator[Check]:
    """Scores, slots and gradients over sizes, dtypes and awkward inputs."""
    cases = _SMALL if setting.small else _LARGE
    first = cases[0]
    for case in cases[: 3 if setting.quick else None]:
        # An interpreter shows the dtypes on the first of the sizes.
        for dtype in DTYPES if case == first or not setting.small else DTYPES[:1]:
            name = f"{case} {dtype_name(dtype)}"
            run = functools.partial(_lookup, setting, case, dtype)
            yield Check(GROUP, name, run, functools.partial(launch, case, dtype))
    flat = next(case for case in cases if case.keys == "flat")
    for name, change in _AWKWARD.items():
        for case in (first, flat):
            run = functools.partial(_lookup, setting, case, torch.float32, change)
            yield Check(GROUP, f"{name}, {case.keys}", run)
    yield Check(GROUP, "no tokens", functools.partial(_no_tokens, setting))
    yield Check(GROUP, "sliced and unaligned storage", functools.partial(_strided, setting, first))
    for case in (first, flat) if setting.small else [*cases[:3], flat]:
        for dtype in DTYPES[:1] if setting.small else DTYPES:
            name = f"gradients, {case} {dtype_name(dtype)}"
            run = functools.partial(_gradients, setting, case, dtype)
            yield Check(GROUP, name, run, functools.partial(launch, case, dtype, backward=True))


def launch(case: Case, dtype: torch.dtype, *, backward: bool = False) -> None:
    """Launch the kernels of a case on tensors without data."""
    from pkm_triton import kernels

    query = torch.empty(case.tokens, case.heads, case.width, dtype=dtype, device="meta")
    keys = torch.empty(_keys_shape(case), dtype=dtype, device="meta")
    product = case.keys == "product"
    forward = kernels.product_key_topk if product else kernels.flat_key_topk
    scores, slots = forward(query, keys, case.top_k)
    if backward:
        derive = kernels.product_key_topk_backward if product else kernels.flat_key_topk_backward
        derive(scores, query, keys, slots)


def lookup(case: Case) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """The public op of a case."""
    return pkm.product_key_topk if case.keys == "product" else pkm.flat_key_topk


def make(setting: Setting, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries [T, H, d_q] and keys."""
    query = setting.randn(case.tokens, case.heads, case.width, seed=1, dtype=dtype)
    return query, setting.randn(*_keys_shape(case), seed=2, dtype=dtype)


def _keys_shape(case: Case) -> tuple[int, ...]:
    if case.keys == "product":
        return case.heads, 2, case.size, case.width // 2
    return case.heads, case.size, case.width


def _ties(query: Tensor, keys: Tensor) -> None:
    keys.fill_(1.0)
    query.round_()


def _few_values(query: Tensor, keys: Tensor) -> None:
    # Small integers: many equal scores, all exact.
    query.mul_(1.5).round_()
    keys.mul_(1.5).round_()


def _rising(query: Tensor, keys: Tensor) -> None:
    # Keys in the order of their scores: the worst for whatever keeps the best so far.
    query.abs_()
    order = torch.linspace(0.5, 1.5, keys.shape[-2], device=keys.device)
    keys.copy_(order[:, None].expand_as(keys))


def _nan(query: Tensor, keys: Tensor) -> None:
    query[0, 0, 0] = torch.nan


def _infinite(query: Tensor, keys: Tensor) -> None:
    query.abs_()
    keys[..., 1, 0] = torch.inf
    keys[..., 2, 0] = -torch.inf


def _unequal(query: Tensor, keys: Tensor) -> None:
    query[..., 0] = 2.0**30
    keys[..., 0] = 0


_AWKWARD = {
    "all scores equal": _ties,
    "many ties": _few_values,
    "keys in rising order": _rising,
    "a NaN in one query": _nan,
    "infinite keys": _infinite,
    "one element 2^30 where keys are zero": _unequal,
}


def _lookup(
    setting: Setting,
    case: Case,
    dtype: torch.dtype,
    change: Callable[[Tensor, Tensor], None] | None = None,
) -> Outcome:
    query, keys = make(setting, case, dtype)
    if change is not None:
        change(query, keys)
    scores, slots = lookup(case)(query, keys, case.top_k)
    return _judge(query, keys, scores, slots)


def _judge(query: Tensor, keys: Tensor, scores: Tensor, slots: Tensor) -> Outcome:
    """The scores are the best of all in order, and the slots have them, none twice."""
    tokens, _, top_k = scores.shape
    num_slots = keys.shape[2] ** 2 if keys.ndim == 4 else keys.shape[1]
    ordered = slots.sort(-1).values
    if ordered.min() < 0 or ordered.max() >= num_slots or (ordered.diff(dim=-1) <= 0).any():
        return Outcome(FAIL, note="a slot is out of range, or comes twice")
    every = product_scores if keys.ndim == 4 else flat_scores
    count = max(2, min(tokens, _ROWS, _SCORES // (query.shape[1] * num_slots)))
    rows = torch.linspace(0, tokens - 1, count, device=scores.device).long().unique()
    query, scores, slots = query[rows], scores[rows], slots[rows].long()
    all_scores = every(query, keys, torch.float64)
    # What float32 costs, over all scores: the best are too few to tell.
    errors = (every(query, keys, torch.float32).double() - all_scores).nan_to_num(0, 0, 0)
    cost = errors.abs().max()

    def judged(oracle: Tensor, note: str) -> Outcome:
        return compare(scores, oracle, (oracle + cost).float(), note=note)

    return worst(
        [
            judged(_best(all_scores, top_k), "the scores are not those of the best slots"),
            judged(all_scores.gather(-1, slots), "the slots do not have the scores"),
        ]
    )


def _best(scores: Tensor, top_k: int) -> Tensor:
    """The best, descending; all NaN where there is one."""
    spoilt = scores.isnan().any(-1, keepdim=True)
    return torch.where(spoilt, torch.nan, scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                       .topk(top_k, dim=-1).values)  # fmt: skip


def _no_tokens(setting: Setting) -> Outcome:
    query, keys = setting.randn(0, 2, 8), setting.randn(2, 2, 16, 4)
    scores, slots = pkm.product_key_topk(query, keys, 4)
    right = scores.shape == slots.shape == (0, 2, 4) and slots.dtype == torch.int32
    return Outcome(PASS if right else FAIL, note="" if right else f"shape {list(scores.shape)}")


def _strided(setting: Setting, case: Case) -> Outcome:
    """Rows that are slices of wider ones, and storage that starts off any boundary."""
    query, keys = make(setting, case, torch.bfloat16)
    wide = torch.cat([query, query], -1)[..., : case.width]
    shifted = keys.new_empty(keys.numel() + 1)[1:].view(keys.shape).copy_(keys)
    found = lookup(case)(wide, shifted, case.top_k)
    expected = lookup(case)(query, keys, case.top_k)
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return Outcome(PASS, 0.0, 0.0) if same else _judge(query, keys, *found)


def _gradients(setting: Setting, case: Case, dtype: torch.dtype) -> Outcome:
    query, keys = make(setting, case, dtype)
    leaves = query.requires_grad_(), keys.requires_grad_()
    scores, slots = lookup(case)(*leaves, case.top_k)
    weights = setting.randn(*scores.shape, seed=3)
    found = torch.autograd.grad(scores, leaves, weights)

    def by_torch(precision: torch.dtype) -> tuple[Tensor, ...]:
        copies = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
        again = scores_of_slots(copies[0], copies[1], slots.long())
        return torch.autograd.grad(again, copies, weights.to(precision))

    oracle, same = by_torch(torch.float64), by_torch(torch.float32)
    return worst(
        [
            compare(
                gradient, exact, setting.round(plain, dtype), note=f"the gradient of the {name}"
            )
            for name, gradient, exact, plain in zip(
                ("query", "keys"), found, oracle, same, strict=True
            )
        ]
    )
