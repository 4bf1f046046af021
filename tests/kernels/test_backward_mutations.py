"""Planted bugs in the backward kernels: each must be caught by the check named beside it."""

import sys

import pytest
import torch
from mutation import is_caught, plant

from pkm_triton import kernels, reference


def check_scatter(mutant, slots=None):
    grad_output, values, weights = torch.randn(30, 20), torch.randn(60, 20), torch.rand(30, 5)
    if slots is None:
        slots = torch.randint(0, 60, (30, 5), dtype=torch.int32)
    inputs = grad_output, values, slots, weights
    expected = reference.gather_values_backward(*inputs, True, True)
    actual = mutant.gather_values_backward(*inputs, True, True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    rows, grad_rows, _ = mutant.gather_values_backward_sparse(*inputs, True)
    assert torch.equal(rows, slots.unique().long())
    torch.testing.assert_close(grad_rows, expected[0][rows], rtol=1e-4, atol=1e-4)


def check_hot_row(mutant):
    check_scatter(mutant, torch.full((30, 5), 4, dtype=torch.int32))


def check_slot_out_of_range(mutant):
    slots = torch.tensor([[1, 9]], dtype=torch.int32)
    ones = torch.ones(9, 16)
    _, grad = mutant.gather_values_backward(ones[:1], ones, slots, torch.ones(1, 2), True, True)
    assert grad.isnan().tolist() == [[False, True]]


def check_lookup(mutant):
    module = sys.modules[f"{mutant.__name__}.product_key_topk"]
    query, subkeys = torch.randn(140, 1, 18), torch.randn(1, 2, 40, 9)
    slots = torch.rand(140, 1, 1600).topk(40).indices.int()
    inputs = torch.randn(140, 1, 40), query, subkeys, slots
    expected = reference.product_key_topk_backward(*inputs)
    # One sum of a sub-key and several, of all tokens at a time and of some.
    for programs, list_bytes in ((2, 1), (6, 1 << 20)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PROGRAMS", programs)
            patch.setattr(module, "LIST_BYTES", list_bytes)
            actual = mutant.product_key_topk_backward(*inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def check_adam(mutant):
    param = torch.ones(4, 8, dtype=torch.bfloat16)
    moments = torch.zeros(4, 8), torch.zeros(4, 8)
    grad = torch.full((2, 8), 0.5)
    options = {"lr": 0.25, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1.0}
    mutant.sparse_adam(param, *moments, torch.tensor([1, 3]), grad, step=1, **options)
    assert param[:, 0].tolist() == [1, 0.5, 1, 0.5]
    torch.testing.assert_close(moments[0][1], torch.full((8,), 0.05))


def check_scatter_adam(mutant, slots=None):
    if slots is None:
        slots = torch.randint(0, 60, (30, 5), dtype=torch.int32)
    step = torch.randn(30, 20), slots, torch.rand(30, 5)
    options = {"lr": 0.25, "beta1": 0.9, "beta2": 0.999, "eps": 1e-3, "weight_decay": 0.1}
    expected = torch.randn(60, 20), torch.randn(60, 20), torch.rand(60, 20)
    actual = [table.clone() for table in expected]
    reference.scatter_adam(*expected, *step, step=2, **options)
    mutant.scatter_adam(*actual, *step, step=2, **options)
    torch.testing.assert_close(actual, list(expected), rtol=1e-4, atol=1e-4)


def check_scatter_adam_hot_row(mutant):
    check_scatter_adam(mutant, torch.full((30, 5), 4, dtype=torch.int32))


MUTATIONS = {
    "runs cut at the end of a stretch": (
        "reads/runs.py", "        end += follows\n", "        end += 0\n", check_scatter,
    ),
    "runs taken from the stretch before": (
        "reads/runs.py", "begin += count_equal", "end_ = count_equal", check_scatter,
    ),
    "sum carried into the next row": (
        "scatter_values.py", "total = tl.zeros([BLOCK_V], tl.float32)\n            if COMPACT",
        "total = total * 1\n            if COMPACT", check_scatter,
    ),
    "value of the row before": (
        "scatter_values.py", "        fresh = last\n", "        fresh = fresh & last\n",
        check_scatter,
    ),
    "unread rows not cleared": (
        "scatter_values.py", "other=1) == 0)", "other=1) == 2)", check_scatter,
    ),
    "parts of a hot row lost": (
        "reads/runs.py", "(mark != LATER_PART) & (part != stretch)", "part != stretch",
        check_hot_row,
    ),
    "hot row written by each part": (
        "scatter_values.py", "inside & ~(part & (position + 1 >= end))", "inside", check_hot_row,
    ),
    "slot out of range read as good": (
        "scatter_values.py", "(slot >= 0) & (slot < num_slots)", "slot >= 0",
        check_slot_out_of_range,
    ),
    "repeats not merged": (
        "reads/sparse_tiles.py", "tl.where(last == last_right, total, 0.0)",
        "tl.where(last == last_right, total / 2, 0.0)", check_lookup,
    ),
    "words not cleared": (
        "reads/sparse_tiles.py", "(row < rows) & (word < WORDS)", "(row < rows) & (word < 0)",
        check_lookup,
    ),
    "values counted from the word's first": (
        "reads/sparse_tiles.py", "((word >> 16) + popcount", "(popcount", check_lookup,
    ),
    "word counted by its last sub-key": (
        "reads/sparse_tiles.py", "(count - popcount(bits)) << 16", "(count - 1) << 16",
        check_lookup,
    ),
    "bits of the next word": (
        "reads/sparse_tiles.py", "tl.where(last >> 4 == last_right >> 4, bits, 0)",
        "tl.where(last >> 5 == last_right >> 5, bits, 0)", check_lookup,
    ),
    "reads of the next query": (
        "reads/sparse_tiles.py", "(own < K - group * 32)", "(own < K)", check_lookup,
    ),
    "columns in another order": (
        "reads/products.py", "n = first + tile_columns(BLOCK_N)[:, None]",
        "n = first + tl.arange(0, BLOCK_N)[:, None]", check_lookup,
    ),
    "halves exchanged": (
        "reads/sparse_tiles.py", "tl.where(half == 0,", "tl.where(half == 1,", check_lookup,
    ),
    "tokens before forgotten": (
        "product_key_topk.py", "ADD=first > 0", "ADD=False", check_lookup,
    ),
    "last stretch of tokens lost": (
        "reads/products.py", "for part in tl.range(num_parts)",
        "for part in tl.range(num_parts - 1)", check_lookup,
    ),
    "decay forgotten": ("sparse_adam.py", "value = value * decay", "value = value", check_adam),
    "sum carried into the next row's step": (
        "scatter_adam.py", "            total = tl.zeros([BLOCK_V], tl.float32)\n            if",
        "            if", check_scatter_adam,
    ),
    "hot row stepped by its last part": (
        "scatter_adam.py", "if part & (position + 1 >= end):", "if part & (position + 1 > end):",
        check_scatter_adam_hot_row,
    ),
    "each part a hot row": (
        "scatter_adam.py", "part & inside & ~later", "part & inside", check_scatter_adam_hot_row,
    ),
    "hot rows not stepped": (
        "scatter_adam.py", "tl.where(first, slot, -1)", "tl.where(first, -1, -1)",
        check_scatter_adam_hot_row,
    ),
    "gradient of another row": (
        "sparse_adam.py", "grad_rows_ptr + index * D", "grad_rows_ptr + row * D", check_adam,
    ),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs to be met in the interpreter only")
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bug_is_caught(name, tmp_path, guard):
    *change, check = MUTATIONS[name]
    assert is_caught(check, plant(tmp_path, *change))


@pytest.mark.parametrize(
    "check",
    sorted({m[3] for m in MUTATIONS.values()}, key=lambda c: c.__name__),
    ids=lambda c: c.__name__,
)
def test_checks_pass_without_a_bug(check, guard):
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")
    check(kernels)
