"""The gather of values against brute force, and what it reads."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from oracle import gather
from tolerance import assert_close_to_oracle

from pkm_triton import kernels

gather_module = importlib.import_module("pkm_triton.kernels.gather_values")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# T, R, K, d_v, dtype of the values, of the weights
CASES = [
    (1, 128, 50, 1024, BFLOAT16, FLOAT32),
    (3, 1, 1, 1, FLOAT32, FLOAT32),
    (63, 12, 40, 60, BFLOAT16, BFLOAT16),
    (40, 7, 300, 1100, FLOAT16, FLOAT32),
    (33, 9, 11, 17, FLOAT32, FLOAT16),
]


def make(case, device):
    num_tokens, reads, num_slots, width, values_dtype, weights_dtype = case
    values = torch.randn(num_slots, width, device=device).to(values_dtype)
    slots = torch.randint(0, num_slots, (num_tokens, reads), dtype=torch.int32, device=device)
    weights = torch.rand(num_tokens, reads, device=device).to(weights_dtype)
    return values, slots, weights


def gather_by_torch(values, slots, weights):
    rows = values[slots.long()].float() * weights.float()[..., None]
    return rows.sum(1).to(values.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_accurate(case, device, guard):
    values, slots, weights = make(case, device)
    out = kernels.gather_values(values, slots, weights)
    assert out.dtype == values.dtype
    expected = gather(values, slots, weights)
    assert_close_to_oracle(out, expected, gather_by_torch(values, slots, weights))


@pytest.mark.parametrize("num_tokens", [2, 33])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_sums_are_rounded_once(dtype, num_tokens, device, guard):
    """Not for every few reads: the error is that of rounding the result, and no more."""
    values, slots, weights = make((num_tokens, 300, 400, 16, dtype, FLOAT32), device)
    exact = gather(values, slots, weights)
    error = (kernels.gather_values(values, slots, weights).double() - exact).abs().max()
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert error <= 1.1 * rounding
    wide = kernels.gather_values(values, slots, weights, FLOAT32)
    assert (wide.double() - exact).abs().max() < 0.01 * rounding


@pytest.mark.parametrize("slot", [-1, 50, 2**31 - 1, -(2**31)])
def test_slot_out_of_range_shows_in_its_token(slot, device, guard):
    values, slots, weights = make((4, 6, 50, 24, FLOAT32, FLOAT32), device)
    clean = kernels.gather_values(values, slots, weights)
    slots[2, 3] = slot
    out = kernels.gather_values(values, slots, weights)
    assert out[2].isnan().all()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(out[others], clean[others])


def test_unaligned_storage(device, guard):
    values = torch.randn(10 * 16 + 1, device=device)[1:].view(10, 16)
    _, slots, weights = make((3, 5, 10, 16, FLOAT32, FLOAT32), device)
    out = kernels.gather_values(values, slots, weights)
    expected = gather(values, slots, weights)
    assert_close_to_oracle(out, expected, gather_by_torch(values, slots, weights))


def test_tokens_of_a_batch_do_not_matter(device, guard):
    values, slots, weights = make((40, 5, 30, 33, FLOAT32, FLOAT32), device)
    whole = kernels.gather_values(values, slots, weights)
    parts = [
        kernels.gather_values(values, slots[i:j], weights[i:j]) for i, j in [(0, 33), (33, 40)]
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_times_silu_of_a_gate(case, device, guard):
    """Rounded as the two operations one after the other."""
    values, slots, weights = make(case, device)
    gate = 4 * torch.randn(slots.shape[0], values.shape[1], device=device).to(values.dtype)
    gate[:, 0] = -torch.inf
    out = kernels.gather_values(values, slots, weights, gate=gate)
    exact = gather(values, slots, weights) * F.silu(gate.double())
    plain = gather_by_torch(values, slots, weights) * F.silu(gate)
    assert out.dtype == values.dtype
    finite = gate[0].isfinite()
    assert_close_to_oracle(out[:, finite], exact[:, finite], plain[:, finite])
    assert torch.equal(out.isnan(), plain.isnan())


def test_nothing_to_gather(device):
    values, slots, weights = make((0, 5, 30, 33, FLOAT32, FLOAT32), device)
    assert kernels.gather_values(values, slots, weights).shape == (0, 33)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_bytes_are_those_of_the_formula(num_tokens, gated, guard):
    values, slots, weights = make((num_tokens, 24, 60, 200, BFLOAT16, FLOAT32), "cpu")
    gate = torch.randn(num_tokens, 200).to(BFLOAT16) if gated else None
    kernels.gather_values(values, slots, weights, gate=gate)
    formula = gather_module.gather_values_bytes(num_tokens, 24, 200, 2, 4, gated)
    assert guard.bytes["gather_values_kernel"] == pytest.approx(formula, rel=0.05)


def test_any_order_of_programs_gives_the_same_bits(guarded):
    values, slots, weights = make((6, 9, 30, 40, FLOAT32, FLOAT32), "cpu")
    results = []
    for seed in range(20):
        with guarded(seed):
            results.append(kernels.gather_values(values, slots, weights))
    assert all(torch.equal(result, results[0]) for result in results)
