"""A user's mistakes: named, before anything has changed."""

import copy

import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton import reference
from pkm_triton.optim import SparseAdam

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1, but must be at least 0, and finite"),
        ({"lr": NAN}, "lr is nan"),
        ({"lr": INF}, "lr is inf"),
        ({"lr": "0.1"}, "lr must be a number, not '0.1'"),
        ({"lr": None}, "lr must be a number, not None"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a floating tensor of one .* \[2\]"),
        ({"lr": torch.tensor(1)}, "floating tensor of one element"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0, but must be at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] is -0.1"),
        ({"betas": (0.9, NAN)}, r"betas\[1\] is nan"),
        ({"betas": 0.9}, "betas must be two numbers, not 0.9"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": "ab"}, "betas must be two numbers, not 'ab'"),
        ({"betas": ("a", 0.9)}, r"betas\[0\] must be a number, not 'a'"),
        ({"betas": None}, "betas must be two numbers, not None"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": 0}, "eps is 0, but must be above 0, and finite"),
        ({"eps": INF}, "eps is inf"),
        ({"eps": None}, "eps must be a number, not None"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": NAN}, "weight_decay is nan"),
        ({"weight_decay": INF}, "weight_decay is inf"),
        ({"weight_decay": "1"}, "weight_decay must be a number, not '1'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed must be an integer, not 1.5"),
        ({"maximize": 1}, "maximize must be True or False, not 1"),
        ({"capturable": "yes"}, "capturable must be True or False, not 'yes'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SparseAdam([nn.Parameter(torch.ones(3, 3))], **options)


@pytest.mark.parametrize(
    "group",
    [
        {"params": [torch.ones(2, 2, dtype=torch.complex64)]},
        {"params": [torch.ones(2, 2, dtype=torch.float8_e4m3fn)]},
        {"params": [torch.ones(2, 2).to_sparse()]},
        {"params": torch.ones(2), "lr": -1.0},
        {"params": (p for p in [torch.ones(2)]), "betas": (2, 3)},
        {"params": [torch.ones(2)], "weight_decay": NAN},
        {"params": ["values"]},
    ],
    ids=lambda group: ",".join(group),
)
def test_a_refused_group_is_not_kept(group):
    first = nn.Parameter(torch.ones(2, 2))
    optimiser = SparseAdam([first])
    with pytest.raises((TypeError, ValueError)):
        optimiser.add_param_group(group)
    assert [g["params"] for g in optimiser.param_groups] == [[first]]
    optimiser.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})
    assert [g["lr"] for g in optimiser.param_groups] == [1e-3, 0.5]


WRONG = {
    "row beyond": ([1, 4], "from 1 to 4 in dimension 0, but .* has 4"),
    "row before": ([-1], "indices from -1 to -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_refused_gradient_moves_and_counts_nothing(name):
    rows, message = WRONG[name]
    wrong = torch.sparse_coo_tensor(
        [rows], torch.ones(len(rows), 2), (4, 2), check_invariants=False
    )
    good, bad = (nn.Parameter(torch.zeros(4, 2)) for _ in range(2))
    optimiser = SparseAdam([good, bad], lr=0.1)
    good.grad, bad.grad = torch.ones(4, 2), wrong
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimiser.step()
    assert not optimiser.state_dict()["state"]
    assert not good.any()
    bad.grad = torch.ones(4, 2)
    optimiser.step()
    assert [optimiser.state[p]["step"] for p in (good, bad)] == [1, 1]
    assert torch.equal(good, bad)


@pytest.mark.parametrize("capturable", [False, True])
def test_an_interrupted_step_is_not_counted(capturable, monkeypatch):
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimiser = SparseAdam([parameter], capturable=capturable)
    parameter.grad = torch.ones(4, 2)
    with monkeypatch.context() as patch:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(reference, "sparse_adam", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimiser.step()
    assert int(optimiser.state[parameter]["step"]) == 0
    optimiser.step()
    assert int(optimiser.state[parameter]["step"]) == 1


def test_a_backend_that_does_not_take_a_dtype_moves_nothing():
    pytest.importorskip("triton")
    good = nn.Parameter(torch.zeros(4, 2))
    wide = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
    good.grad, wide.grad = torch.ones_like(good), torch.ones_like(wide)
    with pkm.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        SparseAdam([good, wide]).step()
    assert not good.any()


def test_state_that_does_not_fit():
    parameter = nn.Parameter(torch.ones(5, 3))
    optimiser = SparseAdam([parameter])
    parameter.grad = torch.ones(5, 3)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(5, 4)
    kept = optimiser.state[parameter]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has shape \[5, 4\]"):
        optimiser.load_state_dict(state)
    assert torch.equal(optimiser.state[parameter]["exp_avg"], kept)
    optimiser.state[parameter]["exp_avg"] = torch.zeros(5, 3, device="meta")
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match="on meta"):
        optimiser.step()
    assert torch.equal(parameter, before)
    assert optimiser.state[parameter]["step"] == 1
