"""State that is saved, loaded, resumed and taken over."""

import copy

import pytest
import torch
from sparse_gradients import sparse, steps
from torch import nn

from pkm_triton.optim import SparseAdam


def test_resumes_to_the_same_bits():
    grads = list(steps(8))
    whole = nn.Parameter(torch.ones(20, 7))
    optimiser = SparseAdam([whole], lr=0.1)
    for grad in grads:
        whole.grad = grad.clone()
        optimiser.step()
    resumed = nn.Parameter(torch.ones(20, 7))
    first = SparseAdam([resumed], lr=0.1)
    for index, grad in enumerate(grads):
        if index == 3:
            second = SparseAdam([resumed], lr=0.1)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first = second
        resumed.grad = grad.clone()
        first.step()
    assert torch.equal(whole, resumed)


def test_takes_over_the_state_of_torch():
    grads = list(steps(6))
    theirs = nn.Parameter(torch.ones(20, 7))
    before = torch.optim.SparseAdam([theirs], lr=0.1)
    for grad in grads[:3]:
        theirs.grad = grad.clone()
        before.step()
    ours = nn.Parameter(theirs.detach().clone())
    after = SparseAdam([ours], lr=0.1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for grad in grads[3:]:
        for parameter, optimiser in ((ours, after), (theirs, before)):
            parameter.grad = grad.clone()
            optimiser.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_loads_as_number_or_tensor(capturable):
    parameter = nn.Parameter(torch.ones(20, 7))
    before = SparseAdam([parameter], lr=0.1, capturable=capturable)
    grads = list(steps(3))
    parameter.grad = grads[0]
    before.step()
    again = nn.Parameter(parameter.detach().clone())
    after = SparseAdam([again], lr=0.1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for each, optimiser in ((parameter, before), (again, after)):
        optimiser.param_groups[0]["capturable"] = not capturable
        for grad in grads[1:]:
            each.grad = grad.clone()
            optimiser.step()
        assert isinstance(optimiser.state[each]["step"], torch.Tensor) != capturable
        assert int(optimiser.state[each]["step"]) == 3
    assert torch.equal(parameter, again)


def test_moments_of_any_strides_can_be_loaded():
    parameter = nn.Parameter(torch.ones(6, 4))
    optimiser = SparseAdam([parameter])
    parameter.grad = sparse([1, 5], torch.ones(2, 4), (6, 4))
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T.contiguous().T
    twin = nn.Parameter(parameter.detach().clone())
    other = SparseAdam([twin])
    other.load_state_dict(state)
    for each, one in ((parameter, optimiser), (twin, other)):
        each.grad = sparse([1], torch.ones(1, 4), (6, 4))
        one.step()
    assert torch.equal(parameter, twin)


def test_capturable_counts_past_256_whatever_the_default_dtype():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimiser = SparseAdam([parameter], capturable=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(260):
            parameter.grad = torch.ones(2, 2, dtype=torch.float32)
            optimiser.step()
    finally:
        torch.set_default_dtype(before)
    assert optimiser.state[parameter]["step"].item() == 260


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hooks_of_loading_are_heeded(dtype):
    parameter = nn.Parameter(torch.ones(8, 4, dtype=dtype))
    optimiser = SparseAdam([parameter])
    parameter.grad = torch.full((8, 4), 0.3, dtype=dtype)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    expected = 2 * state["state"][0]["exp_avg"]

    def double(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"] *= 2
        return state_dict

    seen = []
    again = SparseAdam([parameter])
    again.register_load_state_dict_pre_hook(double)
    again.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[parameter]["exp_avg"].clone()), prepend=True
    )
    for _ in range(2):
        again.load_state_dict(state)
        assert torch.equal(again.state[parameter]["exp_avg"], expected)
        assert seen.pop().dtype == torch.float32


def test_takes_over_the_state_of_torchs_adam():
    theirs = nn.Parameter(torch.ones(20, 7))
    before = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    grads = [grad.to_dense() for grad in steps(6)]
    for grad in grads[:3]:
        theirs.grad = grad
        before.step()
    ours = nn.Parameter(theirs.detach().clone())
    after = SparseAdam([ours], lr=0.1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for grad in grads[3:]:
        for parameter, optimiser in ((ours, after), (theirs, before)):
            parameter.grad = grad
            optimiser.step()
    assert after.param_groups[0]["weight_decay"] == 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
