import copy

import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton.optim import SparseAdam

OPTIONS = [{}, {"lr": 0.05, "betas": (0.5, 0.9)}, {"eps": 1e-3}, {"maximize": True}]


def sparse(rows, values, shape):
    return torch.sparse_coo_tensor(torch.tensor(rows)[None], values, shape, check_invariants=True)


def steps(count=6, shape=(20, 7), seed=0, dtype=torch.float32):
    """Gradients, uncoalesced, of a few rows each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(0, shape[0], (9,), generator=generator)
        values = torch.randn(9, *shape[1:], generator=generator).to(dtype)
        yield sparse(rows.tolist(), values, shape)


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

    module = importlib.import_module("pkm_triton.reference.sparse_adam")
    parameters = [nn.Parameter(torch.ones(200, 7)) for _ in range(2)]
    grad = next(steps(1, (200, 7))).coalesce()
    for parameter, elements in zip(parameters, (1 << 16, 21), strict=True):
        monkeypatch.setattr(module, "ELEMENTS_AT_A_TIME", elements)
        parameter.grad = grad
        SparseAdam([parameter]).step()
    assert torch.equal(*parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestHalfPrecision:
    """Updates smaller than half a unit in the last place of 1.0 must not be lost."""

    def drift(self, dtype, rounding, count=400):
        parameter = nn.Parameter(torch.ones(8, 512, dtype=dtype))
        optimiser = SparseAdam([parameter], lr=1e-4, rounding=rounding)
        grad = sparse(range(8), torch.ones(8, 512, dtype=dtype), (8, 512))
        for _ in range(count):
            parameter.grad = grad.clone()
            optimiser.step()
        return 1 - parameter.detach().float().mean().item()

    def test_nearest_loses_updates(self, dtype):
        assert self.drift(dtype, "nearest") == 0

    @pytest.mark.parametrize("rounding", ["stochastic", "master"])
    def test_updates_add_up(self, dtype, rounding):
        assert self.drift(dtype, rounding) == pytest.approx(400 * 1e-4, rel=0.05)

    def test_moments_are_float32_and_stay_so_when_loaded(self, dtype):
        parameter = nn.Parameter(torch.ones(8, 4, dtype=dtype))
        optimiser = SparseAdam([parameter], rounding="master")
        parameter.grad = sparse([2], torch.full((1, 4), 0.3, dtype=dtype), (8, 4))
        optimiser.step()
        again = SparseAdam([parameter], rounding="master")
        again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        for name in ("exp_avg", "exp_avg_sq", "master"):
            assert again.state[parameter][name].dtype == torch.float32
            assert torch.equal(again.state[parameter][name], optimiser.state[parameter][name])


def test_stochastic_rounding_is_unbiased_and_reproducible():
    from pkm_triton.reference.sparse_adam import stochastic_round

    for dtype, digits in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        for value in (1.0 + digits / 3, -3.0 - digits / 5, 1e-6, 0.0, 2.0):
            x = torch.full((200_000,), value)
            generator = torch.Generator().manual_seed(1)
            rounded = stochastic_round(x, dtype, generator)
            again = stochastic_round(x, dtype, generator.manual_seed(1))
            assert torch.equal(rounded, again)
            spread = 2 * digits * abs(value) + 1e-7
            assert abs(rounded.double().mean().item() - value) < spread / 50
            assert rounded.unique().numel() <= 2
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(
        stochastic_round(special, torch.bfloat16, None).isnan(), torch.tensor([False, False, True])
    )


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


def test_a_master_is_made_where_a_loaded_state_has_none():
    parameter = nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
    before = SparseAdam([parameter], rounding="nearest")
    grad = sparse([2], torch.ones(1, 4, dtype=torch.bfloat16), (8, 4))
    parameter.grad = grad
    before.step()
    after = SparseAdam([parameter], rounding="master")
    state = copy.deepcopy(before.state_dict())
    state["param_groups"][0]["rounding"] = "master"
    after.load_state_dict(state)
    for _ in range(40):
        parameter.grad = grad.clone()
        after.step()
    assert after.state[parameter]["master"].dtype == torch.float32
    assert parameter[2, 0] < 1


def test_stochastic_rounding_repeats_by_the_groups_seed():
    def run(seed):
        parameter = nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16))
        optimiser = SparseAdam([parameter], lr=1e-3, seed=seed)
        parameter.grad = torch.ones(8, 64, dtype=torch.bfloat16)
        optimiser.step()
        assert optimiser.state_dict()["param_groups"][0]["seed"] == seed
        return parameter

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


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


def test_nan_stays_in_its_row():
    parameter = nn.Parameter(torch.ones(5, 3))
    values = torch.ones(2, 3)
    values[0, 1] = torch.nan
    parameter.grad = sparse([1, 3], values, (5, 3))
    SparseAdam([parameter]).step()
    assert parameter[1].isnan().tolist() == [False, True, False]
    assert not parameter[[0, 2, 3, 4]].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": torch.tensor(0.1)}, "lr is a tensor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SparseAdam([nn.Parameter(torch.ones(3, 3))], **options)


def test_bad_parameters_and_state():
    with pytest.raises(TypeError, match="dense floating"):
        SparseAdam([torch.ones(3, 3, dtype=torch.complex64)])
    square = nn.Parameter(torch.ones(3, 3))
    square.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(ValueError, match="1 sparse dimension, its rows, not 2"):
        SparseAdam([square]).step()
    parameter = nn.Parameter(torch.ones(5, 3))
    optimiser = SparseAdam([parameter])
    parameter.grad = torch.ones(5, 3)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    state["state"][0]["exp_avg"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 has shape \[5, 4\]"):
        optimiser.load_state_dict(state)
    optimiser.state[parameter]["exp_avg"] = torch.zeros(5, 3, device="meta")
    with pytest.raises(ValueError, match="on meta"):
        optimiser.step()
