"""Bugs to plant, each as a wrong kernel would show: the check must find every one of them."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Wrong = Callable[[Any, tuple[Any, ...]], Any]
"""From what the right kernel returned, and its arguments, to what a wrong one would."""


def _misses_the_best(result: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> Any:
    """The best slot of the last query is overlooked, and the next ones move up."""
    scores, slots = (each.clone() for each in result)
    scores[-1] = torch.roll(scores[-1], -1, -1)
    slots[-1] = torch.roll(slots[-1], -1, -1)
    scores[-1, ..., -1] = scores[-1, ..., max(0, scores.shape[-1] - 2)]
    return scores, slots


def _repeats_a_slot(result: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> Any:
    scores, slots = (each.clone() for each in result)
    if slots.shape[-1] > 1:
        slots[-1, ..., 1], scores[-1, ..., 1] = slots[-1, ..., 0], scores[-1, ..., 0]
    return scores, slots


def _rounds_scores(result: tuple[Tensor, Tensor], arguments: tuple[Any, ...]) -> Any:
    """As products of float32 in bfloat16 would."""
    return result[0].bfloat16().float(), result[1]


def _drops_a_read(result: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The last read of every token is left out."""
    values, slots, weights = arguments[:3]
    last = values[slots[:, -1].long()].float() * weights[:, -1:].float()
    return (result.float() - last).to(result.dtype)


def _rounds_sums(result: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The sum is kept in the table's dtype from read to read."""
    values, slots, weights = arguments[:3]
    total = torch.zeros_like(result)
    for place in range(slots.shape[1]):
        total += values[slots[:, place].long()] * weights[:, place, None].to(values.dtype)
    return total if values.dtype != torch.float32 else total.half().float()


def _loses_a_row(result: Any, arguments: tuple[Any, ...]) -> Any:
    """The first tensor of the gradients loses its last row."""
    grad, *rest = result
    grad = grad.clone()
    if grad.numel():
        grad[-1] = 0
    return (grad, *rest)


def _loses_a_sparse_row(result: Any, arguments: tuple[Any, ...]) -> Any:
    rows, grad_rows, *rest = result
    grad_rows = grad_rows.clone()
    grad_rows[-1] = 0
    return (rows, grad_rows, *rest)


def _drops_a_column(result: Tensor, arguments: tuple[Any, ...]) -> Any:
    """The last column of the rows is left out of the products."""
    values, slots, x = arguments[:3]
    last = values[slots.long(), -1].float() * x[:, -1:].float()
    return (result.float() - last).to(result.dtype)


def _loses_the_last_row(result: Tensor, arguments: tuple[Any, ...]) -> Any:
    result = result.clone()
    rows = arguments[0].max().long()
    result[rows] = 0
    return result


class _Drifts:
    """Other bits at every call, as a sum in no fixed order."""

    def __init__(self) -> None:
        self._calls = 0

    def __call__(self, result: Tensor, arguments: tuple[Any, ...]) -> Any:
        self._calls += 1
        step = torch.finfo(result.dtype).eps * (self._calls % 2)
        return result * (1 + step)


def _halves_the_second_moment(result: Any, arguments: tuple[Any, ...]) -> Any:
    """The second moments that the step leaves are half of what they should be."""
    arguments[2].mul_(0.5)
    return result


PLANTS: dict[str, tuple[tuple[str, ...], Wrong]] = {
    "lookup-misses-the-best": (("product_key_topk",), _misses_the_best),
    "lookup-repeats-a-slot": (("product_key_topk",), _repeats_a_slot),
    "lookup-rounds-scores": (("product_key_topk",), _rounds_scores),
    "flat-lookup-misses-the-best": (("flat_key_topk",), _misses_the_best),
    "lookup-gradient-loses-a-row": (("product_key_topk_backward",), _loses_a_row),
    "gather-drops-a-read": (("gather_values",), _drops_a_read),
    "gather-rounds-sums": (("gather_values",), _rounds_sums),
    "gather-drifts": (("gather_values",), _Drifts()),
    "sample-drops-a-column": (("sample_values",), _drops_a_column),
    "scatter-loses-a-row": (("scatter_values",), _loses_the_last_row),
    "dense-gradient-loses-a-row": (("gather_values_backward",), _loses_a_row),
    "sparse-gradient-loses-a-row": (("gather_values_backward_sparse",), _loses_a_sparse_row),
    "step-forgets-the-second-moment": (("sparse_adam",), _halves_the_second_moment),
    "factored-step-forgets-the-second-moment": (("scatter_adam",), _halves_the_second_moment),
}
"""Name: the functions it stands in, and what they then return."""


def plant(name: str) -> None:
    """Plant a bug into both backends of this process, for good.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in PLANTS:
        raise ValueError(f"plant: {name!r} is unknown; allowed: {', '.join(PLANTS)}")
    functions, wrong = PLANTS[name]
    for package in ("pkm_triton.kernels", "pkm_triton.reference"):
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError:  # no triton: the reference alone
            continue
        for function in functions:
            setattr(module, function, _planted(getattr(module, function), wrong))


def _planted(right: Callable[..., Any], wrong: Wrong) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        return wrong(right(*arguments, **options), arguments)

    return run
