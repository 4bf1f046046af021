"""Adam from the reads themselves, against the gradient of the rows and then Adam."""

import pytest
import torch

from pkm_triton import kernels, reference

OPTIONS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def make(device, num_tokens=21, reads=9, num_slots=40, width=60, dtype=FLOAT32, kind="zipf"):
    """Tables, and the reads of a step."""
    weight = torch.ones(num_slots)
    if kind == "zipf":
        weight /= torch.arange(1, num_slots + 1)
    slots = torch.multinomial(weight, num_tokens * reads, True).view(num_tokens, reads).int()
    if kind == "one":
        slots.fill_(num_slots // 2)
    tables = torch.randn(num_slots, width).to(dtype), torch.randn(num_slots, width)
    tables = *tables, torch.rand(num_slots, width)
    read = torch.randn(num_tokens, width).to(dtype), slots, torch.rand(num_tokens, reads)
    return [x.to(device) for x in tables], [x.to(device) for x in read]


def in_two(module, tables, read, **options):
    """The rows' gradient first, then the step."""
    grad_output, slots, weights = read
    rows, grad_rows, _ = module.gather_values_backward_sparse(
        grad_output, tables[0], slots, weights, False
    )
    module.sparse_adam(*tables, rows, grad_rows, **options)


def copies(tables):
    return [table.clone() for table in tables]


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "one"])
@pytest.mark.parametrize("width", [60, 1, 2500])
def test_the_same_bits_as_in_two(module, width, kind, device, guard, stretch):
    tables, read = make(device, 9 if width > 1000 else 21, width=width, kind=kind)
    expected = copies(tables)
    in_two(module, expected, read, **OPTIONS)
    module.scatter_adam(*tables, *read, **OPTIONS)
    for name, ours, theirs in zip(("param", "mean", "square"), tables, expected, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["zipf", "one"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_as_the_reference(dtype, kind, device, guard, stretch):
    tables, read = make(device, dtype=dtype, kind=kind)
    tables[0] = tables[0].float().to(dtype)
    master = tables[0].float()
    expected, expected_master = copies(tables), master.clone()
    reference.scatter_adam(*expected, *read, **OPTIONS, master=expected_master)
    kernels.scatter_adam(*tables, *read, **OPTIONS, master=master)
    torch.testing.assert_close(master, expected_master, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tables[1:], expected[1:], rtol=1e-5, atol=1e-5)
    assert torch.equal(tables[0], master.to(dtype))


def test_a_gradient_in_half_precision_is_not_rounded(device, guard):
    """A row read 64 times, by reads that add up to more than bfloat16 has digits for."""
    tables, read = make(device, 64, 1, 4, 16, dtype=BFLOAT16, kind="one")
    read[0].fill_(1.0)
    read[2].fill_(1.0 + 2.0**-12)
    for module in (kernels, reference):
        mean = torch.zeros_like(tables[1])
        module.scatter_adam(tables[0].clone(), mean, tables[2].clone(), *read, **OPTIONS)
        torch.testing.assert_close(mean[2], torch.full_like(mean[2], 6.4 * (1 + 2.0**-12)))


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
def test_slots_out_of_range_are_passed_over(module, device, guard):
    tables, read = make(device, 4, 3, 10, 16)
    read[1][0, 0], read[1][3, 2] = -1, 10
    before = copies(tables)
    module.scatter_adam(*tables, *read, **OPTIONS)
    inside = read[1][(read[1] >= 0) & (read[1] < 10)].unique().tolist()
    for table, old in zip(tables, before, strict=True):
        changed = (table != old).any(1).nonzero().flatten().tolist()
        assert changed == inside
    before = copies(tables)
    read[1].fill_(-1)
    module.scatter_adam(*tables, *read, **OPTIONS)
    assert all(torch.equal(table, old) for table, old in zip(tables, before, strict=True))


def test_repeats_whatever_the_order_of_programs(device, guarded, stretch):
    def run(order):
        torch.manual_seed(1)
        tables, read = make(device, 6, 7, 9, 20, dtype=BFLOAT16)
        with guarded(order):
            kernels.scatter_adam(*tables, *read, **OPTIONS, stochastic_rounding=True, seed=3)
        return tables

    first = run(None)
    for order in range(20):
        for ours, theirs in zip(run(order), first, strict=True):
            assert torch.equal(ours, theirs)


def test_step_on_the_device(device, guard):
    tables, read = make(device)
    expected = copies(tables)
    kernels.scatter_adam(*expected, *read, **OPTIONS)
    on_device = {
        "lr": torch.tensor(0.01, device=device),
        "step": torch.tensor(3.0, device=device),
    }
    kernels.scatter_adam(*tables, *read, **OPTIONS | on_device)
    torch.testing.assert_close(tables, expected, rtol=1e-6, atol=1e-6)


def test_moves_little_more_than_it_must(device, guarded):
    tokens, reads, width = 16, 8, 256
    tables, read = make(device, tokens, reads, 2000, width, kind="uniform")
    with guarded() as guard:
        kernels.scatter_adam(*tables, *read, **OPTIONS)
    rows = read[1].unique().numel()
    must = rows * width * 6 * 4 + tokens * reads * (width * 4 + 40)
    assert sum(guard.bytes.values()) < 1.15 * must
