import pytest
import torch
from sparse_gradients import sparse, steps
from torch import nn

import pkm_triton as pkm
from pkm_triton.optim import SparseAdam

OPTIONS = [{}, {"lr": 0.05, "betas": (0.5, 0.9)}, {"eps": 1e-3}, {"maximize": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("coalesced", [True, False])
def test_step_by_step_as_torch(options, coalesced):
    ours = nn.Parameter(torch.randn(20, 7))
    theirs = nn.Parameter(ours.detach().clone())
    optimisers = SparseAdam([ours], **options), torch.optim.SparseAdam([theirs], **options)
    for grad in steps():
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = grad.coalesce() if coalesced else grad.clone()
            optimiser.step()
        torch.testing.assert_close(ours, theirs)
    for name in ("exp_avg", "exp_avg_sq"):
        state = [o.state[p][name] for o, p in zip(optimisers, (ours, theirs), strict=True)]
        torch.testing.assert_close(*state)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_dense_gradients_as_adamw(weight_decay):
    ours = nn.Parameter(torch.randn(20, 7))
    theirs = nn.Parameter(ours.detach().clone())
    optimisers = (
        SparseAdam([ours], lr=0.01, weight_decay=weight_decay),
        torch.optim.AdamW([theirs], lr=0.01, weight_decay=weight_decay),
    )
    for grad in steps():
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = grad.to_dense()
            optimiser.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_sorted_rows_that_come_twice_are_one():
    """As torch stores the sum of two gradients; without a mark that they are coalesced."""
    ours, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    grad = sparse([1, 1, 3], torch.tensor([[-3.0] * 3, [1.0] * 3, [2.0] * 3]), (5, 3))
    for parameter, kind in ((ours, SparseAdam), (theirs, torch.optim.SparseAdam)):
        parameter.grad = grad.clone()
        kind([parameter], lr=0.1).step()
    assert torch.equal(ours, theirs)
    assert (ours[1] > 1).all()


@pytest.mark.parametrize("sparse_dim", [2, 3])
def test_several_sparse_dimensions_as_torch(sparse_dim):
    ours, theirs = (nn.Parameter(torch.ones(5, 3, 2)) for _ in range(2))
    optimisers = SparseAdam([ours], lr=0.1), torch.optim.SparseAdam([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        index = torch.cat([torch.randint(n, (1, 6), generator=generator) for n in (5, 3, 2)])
        values = torch.randn(6, *(5, 3, 2)[sparse_dim:], generator=generator)
        grad = torch.sparse_coo_tensor(index[:sparse_dim], values, (5, 3, 2), check_invariants=True)
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = grad.clone()
            optimiser.step()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_learning_rate_may_be_a_tensor(capturable):
    ours, theirs = (nn.Parameter(torch.ones(20, 7)) for _ in range(2))
    lr = torch.tensor(0.1)
    optimisers = SparseAdam([ours], lr=lr, capturable=capturable), torch.optim.SparseAdam([theirs])
    for grad, rate in zip(steps(), [0.1, 0.1, 0.02, 0.0, 0.3, 0.3], strict=True):
        lr.fill_(rate)
        optimisers[1].param_groups[0]["lr"] = rate
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = grad.clone()
            optimiser.step()
    torch.testing.assert_close(ours, theirs)


def test_a_learning_rate_of_zero_moves_the_moments_alone():
    """As a schedule that warms up sets it first."""
    parameter = nn.Parameter(torch.ones(5, 3))
    optimiser = SparseAdam([parameter], lr=0.0, weight_decay=0.5)
    parameter.grad = sparse([1, 3], torch.ones(2, 3), (5, 3))
    optimiser.step()
    assert torch.equal(parameter.detach(), torch.ones(5, 3))
    assert optimiser.state[parameter]["exp_avg"][1, 0] == pytest.approx(0.1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", [False, True, "factored"])
def test_a_backward_pass_through_old_values_is_refused(backend, form):
    if backend == "triton":
        pytest.importorskip("triton")
    values = nn.Parameter(torch.randn(20, 8))
    weights = torch.rand(3, 4, requires_grad=True)
    slots = torch.randint(0, 20, (3, 4), dtype=torch.int32)
    optimiser = SparseAdam([values], lr=0.5)
    with pkm.use_backend(backend):
        first = pkm.gather_values(values, slots, weights)
        pkm.gather_values(values, slots, weights.detach(), sparse_grad=form).sum().backward()
        optimiser.step()
        with pytest.raises(RuntimeError, match="inplace operation"):
            first.sum().backward()
        before = {name: optimiser.state[values][name]._version for name in optimiser.state_names}
        optimiser.step()
    for name, version in before.items():
        assert optimiser.state[values][name]._version > version, name


def test_weight_decay_touches_only_touched_rows():
    parameter = nn.Parameter(torch.ones(5, 3))
    parameter.grad = sparse([1, 3], torch.zeros(2, 3), (5, 3))
    SparseAdam([parameter], lr=0.5, weight_decay=0.2).step()
    expected = torch.ones(5, 3)
    expected[[1, 3]] = 0.9
    torch.testing.assert_close(parameter.detach(), expected)


def test_untouched_rows_and_their_state_stay():
    parameter = nn.Parameter(torch.randn(20, 7))
    before = parameter.detach().clone()
    optimiser = SparseAdam([parameter])
    parameter.grad = sparse([4, 9], torch.randn(2, 7), (20, 7))
    optimiser.step()
    rest = torch.ones(20, dtype=torch.bool)
    rest[[4, 9]] = False
    assert torch.equal(parameter[rest], before[rest])
    assert not torch.equal(parameter[~rest], before[~rest])
    assert (optimiser.state[parameter]["exp_avg"][rest] == 0).all()


def test_many_rows_in_pieces(monkeypatch):
    import importlib

    module = importlib.import_module("pkm_triton.reference.row_update")
    parameters = [nn.Parameter(torch.ones(200, 7)) for _ in range(2)]
    grad = next(steps(1, (200, 7))).coalesce()
    for parameter, elements in zip(parameters, (1 << 16, 21), strict=True):
        monkeypatch.setattr(module, "ELEMENTS_AT_A_TIME", elements)
        parameter.grad = grad
        SparseAdam([parameter]).step()
    assert torch.equal(*parameters)


def test_groups_and_schedules():
    layer = pkm.ProductKeyMemory(8, num_subkeys=6, heads=2, top_k=3, query_dim=4, sparse_grad=True)
    optimiser = SparseAdam(pkm.param_groups(layer), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimiser.zero_grad()
        layer(torch.randn(5, 8)).square().sum().backward()
        optimiser.step()
        schedule.step()
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx(
        [2.5e-4 / 4, 1e-3 / 4]
    )


def test_capturable_counts_on_the_device_and_takes_tensors():
    plain, capturable = (nn.Parameter(torch.ones(20, 7)) for _ in range(2))
    lr = torch.tensor(0.1)
    optimisers = SparseAdam([plain], lr=0.1), SparseAdam([capturable], lr=lr, capturable=True)
    for index, grad in enumerate(steps(6)):
        if index == 3:
            lr.fill_(0.02)
            optimisers[0].param_groups[0]["lr"] = 0.02
        for parameter, optimiser in zip((plain, capturable), optimisers, strict=True):
            parameter.grad = grad.clone()
            optimiser.step()
    torch.testing.assert_close(plain, capturable)
    count = optimisers[1].state[capturable]["step"]
    assert isinstance(count, torch.Tensor)
    assert (count.device, count.item()) == (capturable.device, 6)
    assert optimisers[0].state[plain]["step"] == 6


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_transposed_parameter(kind):
    ours, theirs = (nn.Parameter(torch.arange(140.0).view(7, 20).T) for _ in range(2))
    with torch.no_grad():
        theirs.set_(theirs.contiguous())
    assert not ours.is_contiguous()
    for parameter in (ours, theirs):
        optimiser = SparseAdam([parameter], lr=0.1)
        for grad in steps(3):
            parameter.grad = grad if kind == "sparse" else grad.to_dense()
            optimiser.step()
    assert torch.equal(ours, theirs)
    assert not ours.is_contiguous()


def test_nan_stays_in_its_row():
    parameter = nn.Parameter(torch.ones(5, 3))
    values = torch.ones(2, 3)
    values[0, 1] = torch.nan
    parameter.grad = sparse([1, 3], values, (5, 3))
    SparseAdam([parameter]).step()
    assert parameter[1].isnan().tolist() == [False, True, False]
    assert not parameter[[0, 2, 3, 4]].isnan().any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("betas", (2, 0.9)),
        ("eps", -1.0),
        ("rounding", "up"),
        ("seed", -1),
        ("capturable", 1),
    ],
)
def test_loaded_options_are_checked_before_anything_changes(option, value):
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimiser = SparseAdam([param])
    state = optimiser.state_dict()
    before = optimiser.param_groups[0][option]
    state["param_groups"][0][option] = value
    with pytest.raises((ValueError, TypeError), match=option):
        optimiser.load_state_dict(state)
    assert optimiser.param_groups[0][option] == before
