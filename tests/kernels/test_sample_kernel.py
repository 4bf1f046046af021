"""The sampled products against brute force, and what they read."""

import importlib

import pytest
import torch
from oracle import sample
from tolerance import assert_close_to_oracle

from pkm_triton import kernels

sample_module = importlib.import_module("pkm_triton.kernels.sample_values")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# T, R, K, d, dtype of the values, of x, of the products
CASES = [
    (1, 70, 50, 1024, BFLOAT16, BFLOAT16, FLOAT32),
    (3, 1, 1, 1, FLOAT32, FLOAT32, FLOAT32),
    (9, 12, 40, 60, BFLOAT16, FLOAT32, BFLOAT16),
    (4, 7, 30, 1100, FLOAT16, FLOAT16, FLOAT32),
    (33, 9, 11, 17, FLOAT32, FLOAT16, FLOAT16),
    (2, 300, 40, 2, FLOAT32, FLOAT32, FLOAT32),
]


def make(case, device):
    num_tokens, reads, num_slots, width, values_dtype, x_dtype = case[:6]
    values = torch.randn(num_slots, width, device=device).to(values_dtype)
    slots = torch.randint(0, num_slots, (num_tokens, reads), dtype=torch.int32, device=device)
    return values, slots, torch.randn(num_tokens, width, device=device).to(x_dtype)


def sample_by_torch(values, slots, x):
    return torch.einsum("trd,td->tr", values[slots.long()].float(), x.float())


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_accurate(case, device, guard):
    values, slots, x = make(case, device)
    products = kernels.sample_values(values, slots, x, case[-1])
    assert products.dtype == case[-1]
    plain = sample_by_torch(values, slots, x).to(case[-1])
    assert_close_to_oracle(products, sample(values, slots, x), plain)
    assert kernels.sample_values(values, slots, x).dtype == FLOAT32


@pytest.mark.parametrize("slot", [-1, 30, 2**31 - 1, -(2**31)])
def test_slot_out_of_range_shows_in_its_read(slot, device, guard):
    values, slots, x = make(CASES[3], device)
    clean = kernels.sample_values(values, slots, x)
    slots[2, 3] = slot
    products = kernels.sample_values(values, slots, x)
    assert products[2, 3].isnan()
    products[2, 3] = clean[2, 3]
    assert torch.equal(products, clean)


def test_many_reads_dealt_out(device, guard, monkeypatch):
    """A program with several tiles of reads, the last of them not full."""
    values, slots, x = make((2, 300, 40, 33, FLOAT32, FLOAT32), device)
    expected = kernels.sample_values(values, slots, x)
    monkeypatch.setattr(sample_module, "PROGRAMS", 2)
    assert torch.equal(kernels.sample_values(values, slots, x), expected)


def test_table_past_int32(device, guard):
    # Pages that nobody touches take no memory.
    values = torch.empty((1 << 21) + 8, 1024, dtype=BFLOAT16)
    values[-1] = 3
    slots = torch.full((2, 1), values.shape[0] - 1, dtype=torch.int32)
    products = kernels.sample_values(values, slots, torch.ones(2, 1024))
    assert (products == 3 * 1024).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=["one token", "few reads"])
def test_bytes_are_those_of_the_formula(case, guard):
    values, slots, x = make(case, "cpu")
    kernels.sample_values(values, slots, x)
    sizes = values.element_size(), x.element_size(), 4
    formula = sample_module.sample_values_bytes(*case[:2], case[3], *sizes)
    assert guard.bytes["sample_values_kernel"] == pytest.approx(formula, rel=0.05)


def test_any_order_of_programs_gives_the_same_bits(guarded):
    values, slots, x = make((6, 9, 30, 40, FLOAT32, FLOAT32), "cpu")
    results = []
    for seed in range(20):
        with guarded(seed):
            results.append(kernels.sample_values(values, slots, x))
    assert all(torch.equal(result, results[0]) for result in results)
