"""Adam on touched rows against torch.optim.SparseAdam, and its rounding."""

import importlib

import pytest
import torch

sparse_adam = importlib.import_module("pkm_triton.kernels.sparse_adam").sparse_adam
OPTIONS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("width", [37, 1, 1030])
def test_steps_as_torch_does(width, tensors, maximize, device, guard):
    ours = torch.randn(30, width, device=device)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.SparseAdam([theirs], lr=0.01, maximize=maximize)
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    for number in range(1, 5):
        rows = torch.randperm(30, device=device)[:11].sort().values
        grad_rows = torch.randn(11, width, device=device)
        theirs.grad = torch.sparse_coo_tensor(
            rows[None], grad_rows, ours.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()
        step, lr = number, 0.01
        if tensors:
            step, lr = torch.tensor(float(number), device=device), torch.tensor(0.01, device=device)
        sparse_adam(
            ours, *moments, rows, grad_rows, **OPTIONS | {"lr": lr}, step=step, maximize=maximize
        )
    state = optimizer.state[theirs]
    assert torch.equal(moments[0], state["exp_avg"])
    assert torch.equal(moments[1], state["exp_avg_sq"])
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)


def test_decay_before_the_step_on_touched_rows_only(device, guard):
    param = torch.randn(6, 8, device=device)
    before = param.clone()
    rows = torch.tensor([1, 4], device=device)
    zeros = torch.zeros(6, 8, device=device)
    options = OPTIONS | {"weight_decay": 0.5}
    sparse_adam(param, zeros, zeros.clone(), rows, zeros[:2].clone(), **options, step=1)
    expected = before.clone()
    expected[rows] *= 1 - 0.01 * 0.5
    torch.testing.assert_close(param, expected, rtol=1e-7, atol=0)


def test_rows_out_of_range_and_none(device, guard):
    param = torch.randn(6, 8, device=device)
    before = param.clone()
    moments = torch.zeros(6, 8, device=device), torch.zeros(6, 8, device=device)
    rows = torch.tensor([-1, 6, 2**40], device=device)
    sparse_adam(param, *moments, rows, torch.ones(3, 8, device=device), **OPTIONS, step=1)
    sparse_adam(param, *moments, rows[:0], torch.ones(0, 8, device=device), **OPTIONS, step=1)
    assert torch.equal(param, before)
    assert (moments[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_is_what_is_kept(dtype, device, guard):
    master = torch.randn(5, 20, device=device)
    alone, param = master.clone(), master.to(dtype)
    moments = [torch.zeros(5, 20, device=device) for _ in range(4)]
    rows, grad = torch.arange(5, device=device), torch.randn(5, 20, device=device)
    for step in range(1, 4):
        sparse_adam(param, *moments[:2], rows, grad, **OPTIONS, step=step, master=master)
        sparse_adam(alone, *moments[2:], rows, grad, **OPTIONS, step=step)
    assert torch.equal(master, alone)
    assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize("scale", [1.0, 3e-7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype, scale, device):
    width, rounds = 2048, 20
    exact = (torch.rand(1, 1, device=device) + 0.5).expand(1, width) * scale
    zeros = torch.zeros(1, width, device=device)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    total, seen = 0.0, set()
    for step in range(1, rounds + 1):
        param = zeros.to(dtype)
        sparse_adam(
            param, zeros.clone(), zeros.clone(), rows, zeros, **OPTIONS, step=step,
            stochastic_rounding=True, seed=7, master=exact.clone(),
        )  # fmt: skip
        total += param.double().mean().item() / rounds
        seen |= set(param.flatten().tolist())
    low, high = min(seen), max(seen)
    assert len(seen) == 2, "only the two neighbours"
    assert low <= exact[0, 0].item() <= high
    # Four standard deviations of the mean of a fair rounding.
    assert (
        abs(total - exact[0, 0].double().item()) < 4 * 0.5 * (high - low) / (width * rounds) ** 0.5
    )


def test_rounding_repeats_by_seed_and_step(device, guarded):
    def run(seed, step, order=None):
        param = torch.ones(9, 40, dtype=torch.bfloat16, device=device)
        moments = torch.zeros(9, 40, device=device), torch.zeros(9, 40, device=device)
        grad = torch.linspace(-1, 1, 360, device=device).view(9, 40)
        with guarded(order):
            sparse_adam(
                param, *moments, torch.arange(9, device=device), grad,
                **OPTIONS | {"lr": 0.002}, step=step, stochastic_rounding=True, seed=seed,
            )  # fmt: skip
        return param

    first = run(1, 1)
    assert all(torch.equal(first, run(1, 1, order)) for order in range(20))
    assert not torch.equal(first, run(2, 1))
    assert not torch.equal(first, run(1, 2))


def test_nan_stays_in_its_row(device, guard):
    param = torch.ones(3, 8, dtype=torch.bfloat16, device=device)
    moments = torch.zeros(3, 8, device=device), torch.zeros(3, 8, device=device)
    grad = torch.tensor([1.0, torch.nan, 1.0], device=device)[:, None].expand(3, 8).contiguous()
    rows = torch.arange(3, device=device)
    sparse_adam(param, *moments, rows, grad, **OPTIONS, step=1, stochastic_rounding=True)
    assert param.isnan().all(1).tolist() == [False, True, False]


def test_moves_little_more_than_it_must(device, guarded):
    rows, width = 12, 256
    param = torch.zeros(40, width, dtype=torch.bfloat16, device=device)
    moments = torch.zeros(40, width, device=device), torch.zeros(40, width, device=device)
    grad = torch.ones(rows, width, dtype=torch.bfloat16, device=device)
    with guarded() as guard:
        sparse_adam(param, *moments, torch.arange(rows, device=device), grad, **OPTIONS, step=1)
    must = rows * (8 + width * (2 + 2 * 2 + 2 * 4 + 2 * 4))
    assert guard.bytes["sparse_adam_kernel"] <= 1.05 * must
