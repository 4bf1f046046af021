"""Checks of the sample and scatter of a table's rows, and of second derivatives of all ops."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pkm_triton as pkm

from .oracle import (
    compare,
    gather_in_order,
    gathered,
    sample_in_order,
    scatter_in_order,
    scores_of_slots,
    worst,
)
from .outcome import FAIL, Check, Outcome
from .reads import Case
from .setting import DTYPES, Setting, dtype_name

SAMPLE, SCATTER, SECOND = "Sample", "Scatter", "Second derivatives"
_LARGE = [Case(1024, 64, 65_536, 1024), Case(1, 128, 50_000, 1000), Case(333, 33, 400, 33)]
_SMALL = [Case(24, 12, 50, 33), Case(1, 64, 50, 1000)]

Tensors = tuple[Tensor, ...]


def checks(setting: Setting) -> Iterator[Check]:
    """Outputs and gradients over sizes and dtypes; second derivatives on the first size."""
    cases = _SMALL if setting.small else _LARGE
    for case in cases[: 1 if setting.quick else None]:
        for dtype in DTYPES:
            name = f"{case} {dtype_name(dtype)}"
            yield Check(SAMPLE, name, functools.partial(_sample, setting, case, dtype))
            for sparse in (False, True):
                word = "sparse" if sparse else "dense"
                run = functools.partial(_scatter, setting, case, dtype, sparse)
                yield Check(SCATTER, f"{name}, {word}", run)
    yield Check(SECOND, "gather", functools.partial(_second_of_gather, setting, cases[-1]))
    yield Check(SECOND, "lookup", functools.partial(_second_of_lookup, setting))


def _compared(
    setting: Setting,
    names: tuple[str, ...],
    leaves: Tensors,
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    in_order: Callable[..., Tensors],
    grad: Tensor,
) -> Outcome:
    """An output and its gradients beside those of a formula in float64 and in float32.

    `in_order` makes the same from the leaves and the output's gradient, summing in order.
    """

    def derive(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
        out = function(*inputs)
        return out.detach().to_dense(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    def by_torch(precision: torch.dtype) -> Tensors:
        copies = tuple(leaf.detach().to(precision).requires_grad_() for leaf in leaves)
        return derive(formula, copies, upstream)

    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    out = ours(*leaves)
    upstream = grad.to(out.dtype)  # rounded once, for all
    if out.is_sparse:
        found: Tensors = (out.detach().to_dense(),)
    else:
        found = (out.detach(), *torch.autograd.grad(out, leaves, upstream))
    plain = zip(
        by_torch(torch.float32),
        in_order(*(leaf.detach().float() for leaf in leaves), upstream.float()),
        strict=True,
    )
    return worst(
        [
            compare(
                each.to_dense(), exact, *(setting.round(p, each.dtype) for p in both), note=name
            )
            for name, each, exact, both in zip(
                names, found, by_torch(torch.float64), plain, strict=False
            )
        ]
    )


def _sample(setting: Setting, case: Case, dtype: torch.dtype) -> Outcome:
    slots = setting.randint(case.slots, (case.tokens, case.reads), seed=4)
    return _compared(
        setting,
        ("the products", "the gradient of the values", "the gradient of x"),
        (
            setting.randn(case.slots, case.width, seed=5, dtype=dtype),
            setting.randn(case.tokens, case.width, seed=6, dtype=dtype),
        ),
        lambda values, x: pkm.sample_values(values, slots, x),
        lambda values, x: torch.einsum("trd,td->tr", values[slots.long()], x),
        lambda values, x, grad: (
            sample_in_order(values, slots, x),
            scatter_in_order(slots, grad, x, case.slots),
            gather_in_order(values, slots, grad),
        ),
        setting.randn(case.tokens, case.reads, seed=7),
    )


def _scatter(setting: Setting, case: Case, dtype: torch.dtype, sparse: bool) -> Outcome:
    slots = setting.randint(case.slots, (case.tokens, case.reads), seed=4)

    def formula(weights: Tensor, x: Tensor) -> Tensor:
        terms = torch.einsum("tr,td->trd", weights, x)
        table = x.new_zeros(case.slots, case.width)
        return table.index_add(0, slots.flatten().long(), terms.flatten(0, 1))

    def ours(weights: Tensor, x: Tensor) -> Tensor:
        return pkm.scatter_values(slots, weights, x, case.slots, sparse=sparse)

    if sparse:
        rows = ours(
            setting.randn(case.tokens, case.reads, seed=6),
            setting.randn(case.tokens, case.width, seed=5, dtype=dtype),
        )
        if not torch.equal(rows._indices()[0], slots.unique().long()):
            return Outcome(FAIL, note="the rows of the sparse sum are not those read")
    return _compared(
        setting,
        ("the sums", "the gradient of the weights", "the gradient of x"),
        (
            setting.randn(case.tokens, case.reads, seed=6),
            setting.randn(case.tokens, case.width, seed=5, dtype=dtype),
        ),
        ours,
        formula,
        lambda weights, x, grad: (
            scatter_in_order(slots, weights, x, case.slots),
            sample_in_order(grad, slots, x),
            gather_in_order(grad, slots, weights),
        ),
        setting.randn(case.slots, case.width, seed=7),
    )


def _second(
    setting: Setting,
    leaves: Tensors,
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    names: tuple[str, ...],
) -> Outcome:
    """Gradients of a product of the first gradients with fixed tensors."""

    def derive(function: Callable[..., Tensor], inputs: Tensors) -> Tensors:
        out = function(*inputs)
        upstream = setting.randn(*out.shape, seed=50).to(out.dtype)
        first = torch.autograd.grad(out, inputs, upstream, create_graph=True)
        fixed = [
            setting.randn(*each.shape, seed=51 + number).to(each.dtype)
            for number, each in enumerate(first)
        ]
        return torch.autograd.grad(first, inputs, fixed)

    def copies(precision: torch.dtype) -> Tensors:
        return tuple(leaf.detach().to(precision).requires_grad_() for leaf in leaves)

    found = derive(ours, copies(torch.float32))
    exact, plain = (derive(formula, copies(each)) for each in (torch.float64, torch.float32))
    return worst(
        [
            compare(each, true, near, note=f"the derivative {name}")
            for each, true, near, name in zip(found, exact, plain, names, strict=True)
        ]
    )


def _second_of_gather(setting: Setting, case: Case) -> Outcome:
    slots = setting.randint(case.slots, (case.tokens, case.reads), seed=4)
    leaves = (
        setting.randn(case.slots, case.width, seed=5),
        setting.randn(case.tokens, case.reads, seed=6),
    )
    return _second(
        setting,
        leaves,
        lambda values, weights: pkm.gather_values(values, slots, weights),
        lambda values, weights: gathered(values, slots, weights),
        ("of the values", "of the weights"),
    )


def _second_of_lookup(setting: Setting) -> Outcome:
    tokens, heads, num, width, top_k = (3, 1, 12, 4, 3) if setting.small else (64, 4, 128, 64, 16)
    query = setting.randn(tokens, heads, width, seed=1)
    subkeys = setting.randn(heads, 2, num, width // 2, seed=2)
    _, slots = pkm.product_key_topk(query, subkeys, top_k)
    return _second(
        setting,
        (query, subkeys),
        lambda q, keys: pkm.product_key_topk(q, keys, top_k)[0],
        lambda q, keys: scores_of_slots(q, keys, slots.long()),
        ("of the query", "of the sub-keys"),
    )
