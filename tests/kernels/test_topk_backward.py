"""The lookups' gradients against brute force."""

import importlib

import pytest
import torch
from tolerance import assert_close_to_oracle

from pkm_triton.kernels.chip import Chip, as_if

product = importlib.import_module("pkm_triton.kernels.product_key_topk")
flat = importlib.import_module("pkm_triton.kernels.flat_key_topk")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# T, H, N, D, k, dtype of the query, of the sub-keys
CASES = [
    (1, 1, 5, 3, 2, FLOAT32, FLOAT32),
    (33, 2, 20, 17, 9, FLOAT32, FLOAT32),
    (70, 1, 37, 70, 33, FLOAT32, FLOAT32),
    (5, 1, 16, 8, 100, FLOAT32, BFLOAT16),
    (3, 1, 20, 8, 140, FLOAT16, BFLOAT16),
    (30, 2, 20, 30, 9, BFLOAT16, BFLOAT16),
    (30, 1, 40, 30, 9, FLOAT16, FLOAT16),
    (30, 1, 20, 16, 9, BFLOAT16, FLOAT32),
]


def make(case, device):
    num_tokens, heads, num_subkeys, dim, top_k, query_dtype, subkeys_dtype = case
    query = torch.randn(num_tokens, heads, 2 * dim, device=device).to(query_dtype)
    subkeys = torch.randn(heads, 2, num_subkeys, dim, device=device).to(subkeys_dtype)
    slots = torch.rand(num_tokens, heads, num_subkeys**2, device=device).topk(top_k).indices
    return torch.randn(slots.shape, device=device), query, subkeys, slots.int()


def brute_force(grad_scores, query, keys, slots, dtype):
    """By autograd, in `dtype`, through scores gathered from all products."""
    query = query.to(dtype, copy=True).requires_grad_()
    keys = keys.to(dtype, copy=True).requires_grad_()
    if keys.ndim == 4:
        first, second = query.chunk(2, -1)
        rows = torch.einsum("thd,hnd->thn", first, keys[:, 0])
        columns = torch.einsum("thd,hnd->thn", second, keys[:, 1])
        scores = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    else:
        scores = torch.einsum("thd,hkd->thk", query, keys)
    chosen = scores.gather(-1, slots.long())
    return torch.autograd.grad(chosen, (query, keys), grad_scores.to(dtype))


def check(actual, inputs):
    oracle = brute_force(*inputs, torch.float64)
    same = brute_force(*inputs, FLOAT32)
    for grad, exact, rough, like in zip(actual, oracle, same, inputs[1:3], strict=True):
        assert grad.dtype == like.dtype
        assert_close_to_oracle(grad, exact, rough.to(like.dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def test_product_accurate(case, device, guard):
    inputs = make(case, device)
    check(product.product_key_topk_backward(*inputs), inputs)


@pytest.mark.parametrize(
    "case", CASES[1::2], ids=lambda c: "-".join(map(str, c)).replace("torch.", "")
)
def test_flat_accurate(case, device, guard):
    grad_scores, query, subkeys, _ = make(case, device)
    keys = subkeys.repeat(1, 1, 1, 2)[:, 0].contiguous()
    slots = torch.rand(*query.shape[:2], keys.shape[1]).topk(5).indices.int()
    inputs = grad_scores[..., :5].contiguous(), query, keys, slots
    check(flat.flat_key_topk_backward(*inputs), inputs)


@pytest.mark.parametrize("programs", [1, 7])
def test_product_of_few_programs(programs, device, guard, monkeypatch):
    monkeypatch.setattr(product, "PROGRAMS", programs)
    inputs = make((90, 1, 20, 9, 12, FLOAT32, FLOAT32), device)
    check(product.product_key_topk_backward(*inputs), inputs)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100", "gfx942"])
def test_product_in_the_shapes_of_other_chips(architecture, device, guard):
    inputs = make((90, 1, 40, 9, 12, FLOAT32, FLOAT32), device)
    with as_if(Chip(architecture, 16, 64 << 10)):
        check(product.product_key_topk_backward(*inputs), inputs)


def test_same_bits_in_any_order_of_programs(device, guarded):
    inputs = make((70, 1, 9, 8, 5, FLOAT32, FLOAT32), device)
    first = product.product_key_topk_backward(*inputs)
    for seed in range(20):
        with guarded(seed):
            again = product.product_key_topk_backward(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_token(device, guard):
    inputs = make((0, 2, 9, 8, 5, FLOAT32, BFLOAT16), device)
    grad_query, grad_subkeys = product.product_key_topk_backward(*inputs)
    assert grad_query.shape == inputs[1].shape
    assert grad_subkeys.dtype == BFLOAT16
    assert not grad_subkeys.any()


def test_slot_out_of_range_reads_nothing(device, guard):
    grad_scores, query, subkeys, slots = make((20, 1, 9, 8, 5, FLOAT32, FLOAT32), device)
    slots[::2, :, 1], slots[1::2, :, 3] = -1, 81
    good = (slots >= 0) & (slots < 81)
    actual = product.product_key_topk_backward(grad_scores, query, subkeys, slots)
    check(actual, (grad_scores * good, query, subkeys, slots * good))


def test_lists_do_not_grow_with_the_tokens(device, guard, monkeypatch):
    made = set()
    new_empty = torch.Tensor.new_empty

    def recorded(like, *size, **options):
        made.add(size)
        return new_empty(like, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    monkeypatch.setattr(product, "LIST_BYTES", 1)
    sizes = []
    for num_tokens in (130, 300):
        made.clear()
        inputs = make((num_tokens, 1, 40, 8, 5, FLOAT32, BFLOAT16), device)
        check(product.product_key_topk_backward(*inputs), inputs)
        sizes.append(made - {(inputs[1].shape,)})
    assert len(sizes[0]) > 3
    assert sizes[0] == sizes[1]


def test_flat_keys_of_more_rows_than_int32_counts(monkeypatch):
    """So many heads at a time that slots of the one table they make stay int32."""
    rows = []

    def gather_values(table, slots, weights):
        return torch.empty(slots.shape[0], 1, device="meta")

    def gather_values_backward(x, table, *_):
        rows.append(table.shape[0])
        return torch.empty(table.shape, device="meta"), None

    monkeypatch.setattr(flat, "gather_values", gather_values)
    monkeypatch.setattr(flat, "gather_values_backward", gather_values_backward)
    keys, query = torch.empty(5, 2**30 - 1, 1, device="meta"), torch.empty(3, 5, 1, device="meta")
    slots = torch.empty(3, 5, 2, dtype=torch.int32, device="meta")
    flat.flat_key_topk_backward(torch.empty(3, 5, 2, device="meta"), query, keys, slots)
    assert max(rows) < 2**31
    assert sum(rows) == 5 * (2**30 - 1)
