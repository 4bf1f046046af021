"""Checks of `optim.SparseAdam`, from dense and sparse gradients and from gradients as factors."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pkm_triton as pkm

from .oracle import compare, gathered
from .outcome import FAIL, PASS, Check, Outcome
from .setting import DTYPES, Setting, dtype_name

GROUP = "SparseAdam"
_STEPS = 3
_OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
_KINDS = {False: "dense", True: "sparse", "factored": "factored"}


def checks(setting: Setting) -> Iterator[Check]:
    """Three steps over every kind of gradient, dtype and rounding."""
    for dtype in DTYPES:
        for kind, word in _KINDS.items():
            roundings = ("nearest",) if dtype == torch.float32 else ("master", "stochastic")
            for rounding in roundings:
                name = f"{dtype_name(dtype)}, {word} gradient"
                name += "" if dtype == torch.float32 else f", rounding {rounding}"
                run = functools.partial(_steps, setting, dtype, kind, rounding)
                yield Check(GROUP, name, run)


def _steps(setting: Setting, dtype: torch.dtype, kind: bool | str, rounding: str) -> Outcome:
    slots_count, width, tokens, reads = (20, 33, 5, 6) if setting.small else (4000, 1000, 256, 32)
    values = setting.randn(slots_count, width, seed=8, dtype=dtype).requires_grad_()
    start = values.detach().clone()
    rounding_options: Any = {"rounding": rounding}
    optimiser = pkm.optim.SparseAdam([values], **_OPTIONS, **rounding_options)
    gradients: list[tuple[Tensor, Tensor]] = []
    for step in range(_STEPS):
        slots = setting.randint(slots_count // 2, (tokens, reads), seed=10 + step)
        weights = setting.randn(tokens, reads, seed=20 + step)
        grad = setting.randn(tokens, width, seed=30 + step, dtype=dtype)
        read = torch.zeros(slots_count, dtype=torch.bool, device=setting.device)
        read[slots.flatten().long()] = True
        gradients.append((_table_gradient(values, slots, weights, grad), read))
        sparse_grad: Any = kind
        pkm.gather_values(values, slots, weights, sparse_grad=sparse_grad).backward(grad)
        # What the optimiser is given is rounded to the table's dtype, but for what is unmade.
        if values.grad is not None and kind != "factored":
            gradients[-1] = (values.grad.to_dense().double(), read)
        optimiser.step()
        optimiser.zero_grad()
    everywhere = kind is False
    if not everywhere:
        untouched = ~torch.stack([read for _, read in gradients]).any(0)
        if not torch.equal(values.detach()[untouched], start[untouched]):
            return Outcome(FAIL, note="a row without a gradient has moved")
    if rounding == "stochastic":
        return _neighbours(values.detach(), start, gradients, everywhere)
    exact = _adam(start, gradients, torch.float64, everywhere)
    plain = _adam(start, gradients, torch.float32, everywhere).to(dtype)
    return compare(values.detach(), exact, plain, note="the parameter")


def _table_gradient(values: Tensor, slots: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the whole table, float64."""
    table = values.detach().double().requires_grad_()
    out = gathered(table, slots, weights.double())
    return torch.autograd.grad(out, table, grad.double())[0]


def _adam(
    start: Tensor, gradients: list[tuple[Tensor, Tensor]], dtype: torch.dtype, everywhere: bool
) -> Tensor:
    """Adam on the rows that have a gradient, by its definition, in one precision throughout."""
    parameter = start.to(dtype, copy=True)
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    beta1, beta2 = _OPTIONS["betas"]
    for step, (gradient, read) in enumerate(gradients, start=1):
        rows = slice(None) if everywhere else read
        grad = gradient.to(dtype)[rows]
        first[rows] = beta1 * first[rows] + (1 - beta1) * grad
        second[rows] = beta2 * second[rows] + (1 - beta2) * grad**2
        update = first[rows] / (1 - beta1**step)
        # As torch.optim.SparseAdam: eps before the correction.
        root = second[rows].sqrt() + _OPTIONS["eps"]
        update = update * (1 - beta2**step) ** 0.5 / root
        parameter[rows] *= 1 - _OPTIONS["lr"] * _OPTIONS["weight_decay"]
        parameter[rows] -= _OPTIONS["lr"] * update
    return parameter


def _neighbours(
    found: Tensor, start: Tensor, gradients: list[tuple[Tensor, Tensor]], everywhere: bool
) -> Outcome:
    """Rounding up or down at random is off by less than a spacing a step, and right on average."""
    exact = _adam(start, gradients, torch.float64, everywhere)
    spacing = torch.finfo(found.dtype).eps * exact.abs()
    # The moments do not depend on the parameter, so each step's rounding is all there is.
    # An element was further from zero, and its spacing wider, a few steps of the optimiser ago.
    way = 2 * _STEPS * _OPTIONS["lr"]
    allowed = _STEPS * (1.05 * spacing + torch.finfo(found.dtype).eps * way)
    error = (found.double() - exact).abs()
    if (error > allowed).any():
        place = (error / allowed).argmax()
        return Outcome(
            FAIL,
            error.flatten()[place].item(),
            allowed.flatten()[place].item(),
            "an element is further off than rounding can bring it",
        )
    # Near zero the spacing is not in proportion.
    moved = torch.stack([read for _, read in gradients]).any(0)[:, None] & (exact.abs() > 0.01)
    off = ((found.double() - exact) / spacing)[moved]
    bias, limit = off.mean().abs().item(), 6 * (_STEPS / off.numel()) ** 0.5
    passed = bias <= limit
    return Outcome(
        PASS if passed else FAIL, bias, limit, "" if passed else "rounding does not balance"
    )
