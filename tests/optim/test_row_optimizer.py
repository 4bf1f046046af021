"""What a second optimiser gets from the base: one that keeps a number a row, made here."""

import copy

import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton._optimizer_options import check_number
from pkm_triton._row_optimizer import RowOptimizer
from pkm_triton.reference.row_update import RowUpdate


def row_adagrad(param, total, rows, grad_rows, *, lr, eps):
    def rule(value, gradient, total):
        total += gradient.square().mean(1, keepdim=True)
        value -= lr * gradient / (total.sqrt() + eps)

    count = grad_rows.shape[0]
    update = RowUpdate(param, [total], rule, count)
    for start in range(0, count, update.count):
        piece = slice(start, start + update.count)
        update(piece if rows is None else rows[piece], grad_rows[piece])


class RowAdagrad(RowOptimizer):
    state_names = ("total",)

    def __init__(self, params, lr=0.1, eps=1e-8):
        options = {"lr": lr, "eps": eps, "rounding": "nearest", "seed": 0, "capturable": False}
        super().__init__(params, options)

    def check_options(self, options):
        check_number("lr", options["lr"])

    def state_shape(self, name, param):
        return param.shape[:1]

    def update_rows(self, step, rows, grad_rows):
        options = {name: step.group[name] for name in ("lr", "eps")}
        row_adagrad(step.table, step.states["total"], rows, grad_rows, **options)


def textbook(param, total, grad):
    """Rows of no gradient do not move."""
    total += grad.square().mean(1)
    return param - 0.1 * grad / (total.sqrt() + 1e-8)[:, None], total


@pytest.mark.parametrize("form", [False, True, "factored"])
@pytest.mark.parametrize("width", [7, 16])
def test_it_steps_as_the_textbook(form, width):
    values = nn.Parameter(torch.randn(30, width))
    expected, total = values.detach().clone(), torch.zeros(30)
    optimiser = RowAdagrad([values])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randint(0, 30, (6, 4), generator=generator)
        weights = torch.rand(6, 4, generator=generator)
        values.grad = None
        out = pkm.gather_values(values, slots, weights, sparse_grad=form)
        out.square().sum().backward()
        expected, total = textbook(expected, total, values.grad.to_dense())
        optimiser.step()
        torch.testing.assert_close(values.detach(), expected)
    assert optimiser.state[values]["total"].shape == (30,)
    torch.testing.assert_close(optimiser.state[values]["total"], total)


def test_its_state_is_saved_loaded_and_checked():
    values = nn.Parameter(torch.randn(30, 7, dtype=torch.float32).bfloat16())
    optimiser = RowAdagrad([values])
    values.grad = torch.ones_like(values)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    assert state["state"][0]["total"].dtype == torch.float32
    again = RowAdagrad([values])
    again.load_state_dict(state)
    assert torch.equal(again.state[values]["total"], optimiser.state[values]["total"])
    state["state"][0]["total"] = torch.ones(29)
    with pytest.raises(ValueError, match=r"'total' .* \[29\], but must have \[30\]"):
        again.load_state_dict(state)
    with pytest.raises(ValueError, match="lr is -1"):
        RowAdagrad([values], lr=-1)
