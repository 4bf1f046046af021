"""What the ops allocate beside their results: bounded, and never [T, R, d_v]."""

import pytest
import torch

import pkm_triton as pkm
from pkm_triton import reference
from pkm_triton.perf.measure.memory import measure_peak
from pkm_triton.reference.chunks import MAX_WORKING_BYTES
from pkm_triton.reference.gather_values import WIDENED_ELEMENTS
from pkm_triton.reference.row_update import ELEMENTS_AT_A_TIME
from pkm_triton.reference.sample_values import CACHED_ELEMENTS


def working_bytes(call):
    """The most that is alive at one time beside what `call` returns."""
    results = []
    peak = measure_peak(lambda: results.append(call()), lambda: results[0])
    return peak.working_bytes


def test_lookup_does_not_grow_with_tokens():
    subkeys = torch.randn(4, 2, 512, 32)
    for tokens in (512, 4096):
        query = torch.randn(tokens, 4, 64)
        used = working_bytes(lambda q=query: pkm.product_key_topk(q, subkeys, 32))
        results = tokens * 4 * 32 * 8
        assert used <= MAX_WORKING_BYTES + results  # the chunks' results, joined at the end


def test_lookup_backward_does_not_grow_with_tokens():
    query, subkeys = torch.randn(4096, 4, 64), torch.randn(4, 2, 512, 32)
    scores, slots = pkm.product_key_topk(query, subkeys, 32)
    op = torch.ops.pkm_triton.product_key_topk_backward
    assert working_bytes(lambda: op(scores, query, subkeys, slots)) <= MAX_WORKING_BYTES


def test_flat_lookup_never_holds_all_scores():
    query, keys = torch.randn(512, 1, 16), torch.randn(1, 512**2, 16)
    all_scores = 512 * 512**2 * 4
    used = working_bytes(lambda: pkm.flat_key_topk(query, keys, 32))
    assert used <= MAX_WORKING_BYTES < all_scores / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_from_factors_holds_a_few_rows_at_a_time(dtype):
    tokens, reads, width = 256, 128, 512
    tables = [torch.zeros(20_000, width, dtype=each) for each in (dtype, *2 * [torch.float32])]
    slots = torch.randint(0, 20_000, (tokens, reads), dtype=torch.int32)
    weights, grad = torch.rand(tokens, reads), torch.randn(tokens, width).to(dtype)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 1}

    def step():
        reference.scatter_adam(
            *tables, grad, slots, weights, **options, stochastic_rounding=True, master=None
        )

    indices = tokens * reads * 64 + tokens * width * 4
    few_rows = 20 * 4 * ELEMENTS_AT_A_TIME
    used = measure_peak(step).peak_bytes
    assert used <= indices + few_rows
    assert used < slots.unique().numel() * width * 4 / 2


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_step_on_wide_rows_holds_little(kind):
    """As the keys of a flat memory are: few rows, each a large matrix."""
    tables = [torch.zeros(4, 1 << 20) for _ in range(3)]
    rows = None if kind == "dense" else torch.tensor([2])
    grad = torch.ones(4 if rows is None else 1, 1 << 20)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    used = measure_peak(lambda: reference.sparse_adam(*tables, rows, grad, **options)).peak_bytes
    assert used <= (32 * ELEMENTS_AT_A_TIME if rows is None else 5 * grad.nbytes)
    assert (tables[0] != 0).any(1).tolist() == [kind == "dense" or row == 2 for row in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_and_its_gradients_form_no_row_a_read(dtype):
    tokens, reads, width = 256, 128, 512
    values = torch.randn(20_000, width).to(dtype)
    slots = torch.randint(0, 20_000, (tokens, reads), dtype=torch.int32)
    weights, grad = torch.rand(tokens, reads), torch.randn(tokens, width).to(dtype)
    indices = tokens * reads * 64  # the sorted order, and what goes with each read
    ops = torch.ops.pkm_triton
    assert working_bytes(lambda: [ops.gather_values(values, slots, weights, dtype)]) <= indices
    assert indices < tokens * reads * width * values.element_size() / 10
    sparse = working_bytes(
        lambda: ops.gather_values_backward_sparse(grad, values, slots, weights, False)
    )
    # In half precision some rows are widened at a time.
    widened = 0 if dtype == torch.float32 else 12 * WIDENED_ELEMENTS
    assert sparse <= indices + widened
    dense = working_bytes(
        lambda: ops.gather_values_backward(grad, values, slots, weights, True, False)
    )
    assert dense <= indices + 32 * values.shape[0] + widened
    both = working_bytes(
        lambda: ops.gather_values_backward_sparse(grad, values, slots, weights, True)
    )
    copied = 12 * CACHED_ELEMENTS * torch.get_num_threads()
    assert both <= indices + widened + copied
