"""Half-precision parameters: none of their small updates may be lost."""

import copy

import pytest
import torch
from sparse_gradients import sparse, steps
from torch import nn

import pkm_triton as pkm
from pkm_triton import reference
from pkm_triton.optim import SparseAdam
from pkm_triton.reference.rounding import round_stochastically


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
    for dtype, digits in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        smallest = 2.0**-24 if dtype == torch.float16 else 0.0
        for value in (1.0 + digits / 3, -3.0 - digits / 5, 1e-6, -1e-8, 3e-5, 0.0, 2.0):
            x = torch.full((200_000,), value)
            generator = torch.Generator().manual_seed(1)
            rounded = round_stochastically(x, dtype, generator)
            again = round_stochastically(x, dtype, generator.manual_seed(1))
            assert torch.equal(rounded, again)
            spacing = max(2 * digits * abs(value), smallest)
            assert abs(rounded.double().mean().item() - value) <= spacing / 50
            assert rounded.unique().numel() <= 2
            assert (rounded.double() - value).abs().max() <= spacing


SPECIAL = {
    torch.float16: [(65504.0, 65504.0), (65536.0, torch.inf), (-1e6, -torch.inf)],
    torch.bfloat16: [(3.3895313892515355e38, 3.3895313892515355e38), (2.0**-100, 2.0**-100)],
}


@pytest.mark.parametrize("module", ["reference", "kernels"])
@pytest.mark.parametrize("dtype", SPECIAL, ids=str)
def test_what_is_too_large_becomes_infinite(module, dtype, device):
    """As in torch's own conversion; a value between the last number and the next takes either."""
    functions = reference
    if module == "kernels":
        functions = pytest.importorskip("pkm_triton.kernels")
    special = [*SPECIAL[dtype], (torch.inf, torch.inf), (-torch.inf, -torch.inf)]
    largest = torch.finfo(dtype).max
    between = largest + largest * torch.finfo(dtype).eps / 4
    values = [value for value, _ in special] + [between, torch.nan]
    # A NaN whose bits are all ones: a carry would make it zero.
    master = torch.tensor([*values, 0.0], device=device)[:, None].expand(-1, 400).contiguous()
    master[-1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    zeros = torch.zeros_like(master)
    param = zeros.to(dtype)
    functions.sparse_adam(
        param, zeros.clone(), zeros.clone(), None, zeros, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8,
        weight_decay=0.0, step=1, stochastic_rounding=True, seed=5, master=master,
    )  # fmt: skip
    for row, (value, expected) in zip(param, special, strict=False):
        assert (row == expected).all(), f"{value}: {row}"
    share = (param[-3] == torch.inf).float().mean().item()
    # A quarter of a spacing of eps / 2 times the largest number's binade.
    assert ((param[-3] == torch.inf) | (param[-3] == largest)).all()
    assert 0.15 < share < 0.85
    assert param[-2:].isnan().all()


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
    for other in (2, 1 + 2**32, 1 + 2**64, 10**40):
        assert not torch.equal(run(1), run(other)), other


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", ["dense", "sparse", "factored"])
def test_tables_of_one_optimiser_draw_numbers_of_their_own(backend, form):
    if backend == "triton":
        pytest.importorskip("triton")
    tables = [nn.Parameter(torch.ones(16, 32, dtype=torch.bfloat16)) for _ in range(3)]
    slots, weights = torch.arange(16)[:, None], torch.ones(16, 1)
    for table in tables:
        if form == "factored":
            pkm.gather_values(table, slots, weights, sparse_grad="factored").sum().backward()
        else:
            table.grad = torch.ones_like(table)
            table.grad = table.grad.to_sparse(1) if form == "sparse" else table.grad
    # Of two groups with the same seed.
    optimiser = SparseAdam([{"params": tables[:2]}, {"params": tables[2:]}], seed=10**30)
    with pkm.use_backend(backend):
        optimiser.step()
    for one, two in ((0, 1), (0, 2), (1, 2)):
        differ = (tables[one] != tables[two]).float().mean().item()
        assert differ > 0.02, (one, two)


@pytest.mark.parametrize("module", ["reference", "kernels"])
def test_all_of_a_seed_counts(module, device):
    functions = reference
    if module == "kernels":
        functions = pytest.importorskip("pkm_triton.kernels")

    def run(seed):
        param = torch.ones(4, 64, dtype=torch.bfloat16, device=device)
        moments = torch.zeros(4, 64, device=device), torch.zeros(4, 64, device=device)
        functions.sparse_adam(
            param, *moments, None, torch.ones(4, 64, device=device), lr=1e-3, beta1=0.9, beta2=0.9,
            eps=1e-8, weight_decay=0.0, step=1, stochastic_rounding=True, seed=seed,
        )  # fmt: skip
        return param

    assert torch.equal(run(1), run(1))
    for seed in (0, 2, 1 + 2**32, 1 + 2**62):
        assert not torch.equal(run(1), run(seed)), seed


def test_random_numbers_of_another_step():
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimiser = SparseAdam([parameter], betas=(0.0, 0.0))
    moved = []
    for _ in range(2):
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        moved.append(parameter.detach().clone())
    assert not torch.equal(*moved)


def test_the_default_dtype_changes_nothing():
    def run():
        parameter = nn.Parameter(torch.ones(8, 64, dtype=torch.bfloat16))
        optimiser = SparseAdam([parameter], lr=torch.tensor(1e-3, dtype=torch.float32))
        for grad in steps(4, (8, 64), dtype=torch.bfloat16):
            parameter.grad = grad
            optimiser.step()
        return parameter.detach()

    expected = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(run().float(), expected.float())
    finally:
        torch.set_default_dtype(before)
