"""The gradients of the gather of values against brute force."""

import pytest
import torch
from oracle import gather
from tolerance import assert_close_to_oracle

from pkm_triton import kernels
from pkm_triton.kernels.reads import runs
from pkm_triton.kernels.scatter_values import scatter

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# T, R, K, d_v, dtype of the gradient, the values and the weights, how slots are drawn
CASES = [
    (1, 1, 1, 1, FLOAT32, FLOAT32, FLOAT32, "uniform"),
    (1, 33, 50, 70, BFLOAT16, BFLOAT16, FLOAT32, "uniform"),
    (21, 9, 40, 60, BFLOAT16, BFLOAT16, BFLOAT16, "zipf"),
    (13, 7, 5, 17, FLOAT16, FLOAT16, FLOAT16, "zipf"),
    (19, 8, 30, 33, FLOAT32, BFLOAT16, FLOAT16, "one"),
    (15, 6, 900, 48, BFLOAT16, FLOAT32, FLOAT32, "uniform"),
    (5, 4, 9, 2500, FLOAT32, FLOAT32, BFLOAT16, "zipf"),
]


def draw_slots(kind, num_tokens, reads, num_slots):
    if kind == "one":
        return torch.full((num_tokens, reads), num_slots // 2, dtype=torch.int32)
    weight = torch.ones(num_slots)
    if kind == "zipf":
        weight /= torch.arange(1, num_slots + 1)
    return torch.multinomial(weight, num_tokens * reads, True).view(num_tokens, reads).int()


def make(case, device):
    num_tokens, reads, num_slots, width, *dtypes, kind = case
    grad_output = torch.randn(num_tokens, width).to(device, dtypes[0])
    values = torch.randn(num_slots, width).to(device, dtypes[1])
    weights = torch.rand(num_tokens, reads).to(device, dtypes[2])
    return grad_output, values, draw_slots(kind, num_tokens, reads, num_slots).to(device), weights


def brute_force(grad_output, values, slots, weights, dtype):
    """Gradients computed in `dtype`; a slot out of range adds to no row and shows as NaN."""
    grad_output, table, weights = grad_output.to(dtype), values.to(dtype), weights.to(dtype)
    inside = (slots >= 0) & (slots < values.shape[0])
    slots = slots.long().clamp(0, values.shape[0] - 1)
    parts = (weights * inside)[..., None] * grad_output[:, None]
    grad_values = torch.zeros_like(table).index_add_(0, slots.flatten(), parts.flatten(0, 1))
    grad_weights = torch.einsum("td,trd->tr", grad_output, table[slots])
    return grad_values, grad_weights.masked_fill(~inside, torch.nan)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_accurate(case, device, guard, stretch):
    inputs = make(case, device)
    _, values, slots, weights = inputs
    oracle = brute_force(*inputs, torch.float64)
    same = [g.to(x.dtype) for g, x in zip(brute_force(*inputs, FLOAT32), inputs[1::2], strict=True)]
    grad_values, grad_weights = kernels.gather_values_backward(*inputs, True, True)
    assert (grad_values.dtype, grad_weights.dtype) == (values.dtype, weights.dtype)
    assert_close_to_oracle(grad_values, oracle[0], same[0])
    assert_close_to_oracle(grad_weights, oracle[1], same[1])
    rows, grad_rows, sparse_weights = kernels.gather_values_backward_sparse(*inputs, True)
    assert torch.equal(rows, slots.unique().long())
    # The same sums, whatever form they are given out in.
    assert torch.equal(grad_rows, grad_values[rows])
    assert torch.equal(sparse_weights, grad_weights)
    untouched = torch.ones(values.shape[0], dtype=torch.bool, device=device)
    untouched[rows] = False
    assert (grad_values[untouched] == 0).all()


@pytest.mark.parametrize(
    "case", CASES[1:], ids=lambda c: "-".join(map(str, c)).replace("torch.", "")
)
def test_scatter_from_weights_alone(case, device, guard, stretch):
    grad_output, values, slots, weights = make(case, device)
    both, _ = kernels.gather_values_backward(grad_output, values, slots, weights, True, True)
    table = kernels.scatter_values(slots, weights, grad_output, values.shape[0], values.dtype)
    # The same sums as those of the gradients' pass.
    assert torch.equal(table, both)
    rows, sums = kernels.scatter_values_sparse(slots, weights, grad_output, values.shape[0])
    assert sums.dtype == grad_output.dtype
    oracle = brute_force(grad_output, values, slots, weights, torch.float64)[0]
    plain = brute_force(grad_output, values, slots, weights, FLOAT32)[0].to(sums.dtype)
    assert torch.equal(rows, slots.unique().long())
    assert_close_to_oracle(sums, oracle[rows], plain[rows])


def test_only_what_is_wanted(device, guard):
    inputs = make(CASES[2], device)
    both = kernels.gather_values_backward(*inputs, True, True)
    oracle = brute_force(*inputs, torch.float64)[1]
    nothing = torch.full_like(inputs[1], torch.nan)
    values_only = kernels.gather_values_backward(inputs[0], nothing, *inputs[2:], True, False)
    assert torch.equal(values_only[0], both[0])
    assert values_only[1].shape == (0,)
    no_weights = torch.full_like(inputs[3], torch.nan)
    weights_only = kernels.gather_values_backward(*inputs[:3], no_weights, False, True)
    assert weights_only[0].shape == (0,)
    assert_close_to_oracle(weights_only[1], oracle, both[1])
    assert kernels.gather_values_backward_sparse(*inputs, False)[2].shape == (0,)
    assert [g.shape for g in kernels.gather_values_backward(*inputs, False, False)] == [(0,), (0,)]


@pytest.mark.parametrize("needs_values", [True, False])
def test_slots_out_of_range(needs_values, device, guard, stretch):
    grad_output, values, slots, weights = make(CASES[6], device)
    slots[0], slots[1, 1], slots[2, 0], slots[3:] = -1, 9, 2**31 - 1, -(2**31)
    inputs = grad_output, values, slots, weights
    oracle = brute_force(*inputs, torch.float64)
    grads = kernels.gather_values_backward(*inputs, needs_values, True)
    torch.testing.assert_close(grads[1].double(), oracle[1], rtol=1e-2, atol=0.1, equal_nan=True)
    if needs_values:
        torch.testing.assert_close(grads[0].double(), oracle[0], rtol=1e-5, atol=1e-5)
    rows, grad_rows, _ = kernels.gather_values_backward_sparse(*inputs, True)
    assert torch.equal(rows, slots[(slots >= 0) & (slots < 9)].unique().long())
    torch.testing.assert_close(grad_rows.double(), oracle[0][rows], rtol=1e-5, atol=1e-5)


def test_same_bits_in_any_order_of_programs(device, guarded, monkeypatch):
    monkeypatch.setattr(runs, "LEAST_STRETCH", 3)
    inputs = make((11, 5, 12, 20, FLOAT32, FLOAT32, FLOAT32, "zipf"), device)
    first = kernels.gather_values_backward(*inputs, True, True)
    for seed in range(20):
        with guarded(seed):
            again = kernels.gather_values_backward(*inputs, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_adjoint_of_the_gather(device, guard):
    grad_output, values, slots, weights = make(CASES[4][:4] + (FLOAT32,) * 3 + ("zipf",), device)
    grad_values, grad_weights = kernels.gather_values_backward(
        grad_output, values, slots, weights, True, True
    )
    product = (gather(values, slots, weights) * grad_output.double()).sum()
    torch.testing.assert_close(
        (grad_values.double() * values.double()).sum(), product, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        (grad_weights.double() * weights.double()).sum(), product, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("follow", [63, 64, 65, 150])
def test_runs_longer_than_what_is_counted_at_once(follow, device, guard, monkeypatch):
    """A run that goes on into the next stretch for more reads than one tile of comparisons."""
    monkeypatch.setattr(runs, "LEAST_STRETCH", 200)
    slots = torch.tensor([*[0] * 190, *[1] * (10 + follow), *[2] * (200 - follow)])
    slots = slots[torch.randperm(400)].view(40, 10).int().to(device)
    grad_output, weights = torch.randn(40, 8, device=device), torch.rand(40, 10, device=device)
    table = kernels.scatter_values(slots, weights, grad_output, 3)
    oracle = brute_force(grad_output, torch.zeros(3, 8), slots, weights, torch.float64)[0]
    plain = brute_force(grad_output, torch.zeros(3, 8), slots, weights, FLOAT32)[0]
    assert_close_to_oracle(table, oracle, plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a table of which the interpreter uses a row")
def test_rows_past_int32(guard, monkeypatch):
    """Dense rows whose elements lie beyond what int32 counts; the rest stays as it is."""
    monkeypatch.undo()  # the poison would touch all of it
    table = torch.empty(1, 1, dtype=BFLOAT16).expand((1 << 21) + 8, 1024)
    slots = torch.full((2, 1), table.shape[0] - 1, dtype=torch.int32)
    _, sums, _ = scatter(slots, torch.ones(2, 1), torch.ones(2, 1024), table, None, compact=False)
    assert (sums[-1] == 2).all()


def test_table_past_int32(device, guard):
    # Pages that nobody touches take no memory.
    values = torch.empty((1 << 21) + 8, 1024, dtype=BFLOAT16)
    values[-1] = 3
    slots = torch.full((2, 1), values.shape[0] - 1, dtype=torch.int32)
    rows, grad_rows, grad_weights = kernels.gather_values_backward_sparse(
        torch.ones(2, 1024), values, slots, torch.ones(2, 1), True
    )
    assert rows.tolist() == [values.shape[0] - 1]
    assert (grad_rows == 2).all()
    assert (grad_weights == 3 * 1024).all()


def test_reads_and_writes_each_row_once(device, guarded):
    num_tokens, reads, width = 40, 8, 64
    inputs = make((num_tokens, reads, 50, width, FLOAT32, FLOAT32, FLOAT32, "uniform"), device)
    with guarded() as guard:
        rows, _, _ = kernels.gather_values_backward_sparse(*inputs, True)
    bound = 2 * rows.numel() * width * 4 + num_tokens * reads * (width * 4 + 40)
    assert guard.bytes["scatter_values_kernel"] < 1.15 * bound
