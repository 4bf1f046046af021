"""Checks of the gather of values and its gradients, dense, sparse and kept as factors."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import pkm_triton as pkm

from .oracle import (
    compare,
    gather_in_order,
    gathered,
    sample_in_order,
    scatter_in_order,
    worst,
)
from .outcome import FAIL, PASS, SKIP, Check, Outcome
from .setting import DTYPES, Setting, dtype_name

GROUP = "Gather"
_KINDS = {False: "dense", True: "sparse"}


@dataclass(frozen=True)
class Case:
    """A gather's sizes: T tokens, R reads a token, K slots, d_v."""

    tokens: int
    reads: int
    slots: int
    width: int

    def __str__(self) -> str:
        return f"T={self.tokens} R={self.reads} K={self.slots} d_v={self.width}"


_LARGE = [
    Case(1024, 64, 65_536, 1024),
    Case(1, 128, 50_000, 1000),
    Case(333, 33, 400, 33),
    Case(4096, 1, 7, 1),
]
_SMALL = [Case(24, 12, 50, 33), Case(1, 64, 50, 1000), Case(9, 1, 7, 1)]


def checks(setting: Setting) -> Iterator[Check]:
    """Outputs and gradients over sizes, dtypes and awkward reads."""
    cases = _SMALL if setting.small else _LARGE
    for case in cases[: 2 if setting.quick else None]:
        for dtype in DTYPES:
            for kind, word in _KINDS.items():
                name = f"{case} {dtype_name(dtype)}, {word} gradient"
                run = functools.partial(_gather, setting, case, dtype, kind, _draw)
                yield Check(GROUP, name, run)
    case = cases[0]
    for name, draw in _AWKWARD.items():
        for kind, word in _KINDS.items():
            run = functools.partial(_gather, setting, case, torch.bfloat16, kind, draw)
            yield Check(GROUP, f"{name}, {word} gradient", run)
    for dtype in DTYPES[1:]:
        name = f"weights of {dtype_name(dtype)}"
        run = functools.partial(_gather, setting, case, torch.float32, True, _draw, dtype)
        yield Check(GROUP, name, run)
    yield Check(GROUP, "no tokens", functools.partial(_no_tokens, setting))
    yield Check(GROUP, "infinite values and weights", functools.partial(_infinite, setting, case))
    yield Check(GROUP, "a table past 2^31 elements", functools.partial(_huge, setting))


def _draw(setting: Setting, case: Case) -> Tensor:
    return setting.randint(case.slots, (case.tokens, case.reads), seed=4)


def _one_slot(setting: Setting, case: Case) -> Tensor:
    return torch.full_like(_draw(setting, case), case.slots - 1)


def _hot_slot(setting: Setting, case: Case) -> Tensor:
    drawn = _draw(setting, case)
    return torch.where(drawn % 3 == 0, drawn, case.slots - 1)


def _twice(setting: Setting, case: Case) -> Tensor:
    return _draw(setting, case)[:, : (case.reads + 1) // 2].repeat_interleave(2, 1)


_AWKWARD = {
    "every read of one slot": _one_slot,
    "one hot slot": _hot_slot,
    "each slot twice in a token": _twice,
}


def _gather(
    setting: Setting,
    case: Case,
    dtype: torch.dtype,
    sparse: bool,
    draw: Callable[[Setting, Case], Tensor],
    weights_dtype: torch.dtype = torch.float32,
) -> Outcome:
    slots = draw(setting, case)
    values = setting.randn(case.slots, case.width, seed=5, dtype=dtype).requires_grad_()
    weights = setting.randn(*slots.shape, seed=6, dtype=weights_dtype).requires_grad_()
    grad = setting.randn(case.tokens, case.width, seed=7, dtype=dtype)
    out = pkm.gather_values(values, slots, weights, sparse_grad=sparse)
    leaves = (values, weights)
    found = torch.autograd.grad(out, leaves, grad)
    if found[0].is_sparse:
        rows = found[0]._indices()[0]
        if not torch.equal(rows, slots.unique().long()):
            return Outcome(FAIL, note="the rows of the sparse gradient are not those read")
    elif sparse:
        return Outcome(FAIL, note="the gradient of the values is not sparse")

    def by_torch(precision: torch.dtype) -> tuple[Tensor, ...]:
        copies = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
        again = gathered(copies[0], slots, copies[1])
        return again.detach(), *torch.autograd.grad(again, copies, grad.to(precision))

    table, few, upstream = values.detach().float(), weights.detach().float(), grad.float()
    in_order = (
        gather_in_order(table, slots, few),
        scatter_in_order(slots, few, upstream, case.slots),
        sample_in_order(table, slots, upstream),
    )
    names = ("the output", "the gradient of the values", "the gradient of the weights")
    actual = (out.detach(), found[0].to_dense(), found[1])
    plain = zip(by_torch(torch.float32), in_order, strict=True)
    return worst(
        [
            compare(each, exact, *(setting.round(p, each.dtype) for p in both), note=name)
            for name, each, exact, both in zip(
                names, actual, by_torch(torch.float64), plain, strict=True
            )
        ]
    )


def _no_tokens(setting: Setting) -> Outcome:
    values = setting.randn(5, 3).requires_grad_()
    slots = setting.randint(5, (0, 4))
    out = pkm.gather_values(values, slots, setting.randn(0, 4))
    out.sum().backward()
    right = out.shape == (0, 3) and values.grad is not None and not values.grad.any()
    return Outcome(PASS if right else FAIL, note="" if right else "not the empty sum")


def _infinite(setting: Setting, case: Case) -> Outcome:
    values = setting.randn(case.slots, case.width, seed=5)
    values[1], values[2] = torch.inf, -torch.inf
    slots = _draw(setting, case)
    weights = setting.randn(*slots.shape, seed=6).abs()
    out = pkm.gather_values(values, slots, weights)
    oracle = gathered(values.double(), slots, weights.double())
    plain = gathered(values, slots, weights), gather_in_order(values, slots, weights)
    return compare(out, oracle, *plain, note="the output")


def _huge(setting: Setting) -> Outcome:
    """The last rows of a table of more elements than an int32 counts, read and given gradients."""
    width = 1024
    num_slots = 2**31 // width + 1000
    # The table, its sparse gradient, and what making the table takes.
    if not setting.room_for(2.5 * 2 * num_slots * width):
        return Outcome(SKIP, note="too little memory for the table")
    values = torch.zeros(num_slots, width, dtype=torch.bfloat16, device=setting.device)
    tail = setting.randn(500, width, seed=5, dtype=torch.bfloat16)
    values[-500:] = tail
    values.requires_grad_()
    slots = setting.randint(500, (64, 16), seed=4)
    weights = setting.randn(64, 16, seed=6)
    out = pkm.gather_values(values, slots + (num_slots - 500), weights, sparse_grad=True)
    (grad,) = torch.autograd.grad(out, values, torch.ones_like(out))
    again = tail.double().requires_grad_()
    oracle = gathered(again, slots, weights.double())
    (grad_oracle,) = torch.autograd.grad(oracle, again, torch.ones_like(oracle))
    small = tail.float().requires_grad_()
    plain = gathered(small, slots, weights)
    (grad_plain,) = torch.autograd.grad(plain, small, torch.ones_like(plain))
    rows = grad._indices()[0] - (num_slots - 500)
    if not torch.equal(rows, slots.unique().long()):
        return Outcome(FAIL, note="the rows of the sparse gradient are not those read")
    dtype = torch.bfloat16
    return worst(
        [
            compare(out, oracle.detach(), plain.detach().to(dtype), note="the output"),
            compare(
                grad._values(), grad_oracle[rows], grad_plain[rows].to(dtype), note="the gradient"
            ),
        ]
    )
