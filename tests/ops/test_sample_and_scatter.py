"""Sample and scatter against brute force; the gather's adjoints."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gather, sample, scatter
from tolerance import assert_close_to_oracle
from torch.library import opcheck

import pkm_triton as pkm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32 = torch.float32


def make(num_slots, width, num_tokens, reads, dtype=FLOAT32, other=FLOAT32):
    slots = torch.randint(0, num_slots, (num_tokens, reads), dtype=torch.int32)
    values, x = torch.randn(num_slots, width).to(dtype), torch.randn(num_tokens, width).to(other)
    return values, slots, x, torch.rand(num_tokens, reads).to(dtype)


@given(
    num_slots=st.integers(1, 50),
    width=st.integers(0, 33),
    num_tokens=st.integers(0, 9),
    reads=st.integers(0, 40),
    long=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sizes(num_slots, width, num_tokens, reads, long, seed):
    torch.manual_seed(seed)
    values, slots, x, weights = make(num_slots, width, num_tokens, reads)
    slots = slots.long() if long else slots
    close = {"atol": 1e-4, "rtol": 1e-4}
    products = pkm.sample_values(values, slots, x)
    torch.testing.assert_close(products.double(), sample(values, slots, x), **close)
    expected = scatter(slots, weights, x, num_slots)
    table = pkm.scatter_values(slots, weights, x, num_slots)
    torch.testing.assert_close(table.double(), expected, **close)
    sparse = pkm.scatter_values(slots, weights, x, num_slots, sparse=True)
    assert sparse.is_coalesced()
    assert torch.equal(sparse.indices()[0], slots.unique().long())
    torch.testing.assert_close(sparse.to_dense().double(), expected, **close)
    factored = pkm.scatter_values(slots, weights, x, num_slots, sparse="factored")
    assert factored.shape == (num_slots, width)
    if width > 0 and slots.numel() > 0:
        torch.testing.assert_close(factored.to_dense().double(), expected, **close)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_against_the_oracle(dtype, other):
    values, slots, x, weights = make(200, 60, 31, 24, dtype, other)
    slots[3] = slots[3, 0]
    products = pkm.sample_values(values, slots, x)
    assert products.dtype == FLOAT32
    plain = torch.einsum("trd,td->tr", values[slots].float(), x.float())
    assert_close_to_oracle(products, sample(values, slots, x), plain)
    for sparse in (False, True):
        table = pkm.scatter_values(slots, weights, x, 200, sparse=sparse)
        assert table.dtype == other
        parts = (weights.float()[..., None] * x.float()[:, None]).flatten(0, 1)
        plain = torch.zeros(200, 60).index_add_(0, slots.flatten(), parts).to(other)
        assert_close_to_oracle(table.to_dense(), scatter(slots, weights, x, 200), plain)


def test_float64():
    values, slots, x, weights = make(20, 5, 7, 6, torch.float64, torch.float64)
    torch.testing.assert_close(pkm.sample_values(values, slots, x), sample(values, slots, x))
    table = pkm.scatter_values(slots, weights, x, 20)
    torch.testing.assert_close(table, scatter(slots, weights, x, 20))
    assert pkm.sample_values(values.float(), slots, x).dtype == torch.float64


def test_adjoints_of_the_gather():
    """<gather(V, w), X> = <w, sample(V, X)> = <V, scatter(w, X)>."""
    values, slots, x, weights = make(40, 9, 20, 7, torch.float64, torch.float64)
    product = (gather(values, slots, weights) * x).sum()
    torch.testing.assert_close((pkm.sample_values(values, slots, x) * weights).sum(), product)
    table = pkm.scatter_values(slots, weights, x, 40)
    torch.testing.assert_close((table * values).sum(), product)


@pytest.mark.parametrize("sparse_grad", [True, "factored"])
def test_forms_of_the_gradient(sparse_grad):
    values, slots, x, _ = make(40, 9, 20, 7)
    found = []
    for form in (False, sparse_grad):
        leaf, token = values.clone().requires_grad_(), x.clone().requires_grad_()
        pkm.sample_values(leaf, slots, token, form).square().sum().backward()
        found.append((leaf.grad, token.grad))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[1][0].to_dense(), found[0][0])
    assert found[1][0].is_coalesced() if sparse_grad is True else found[1][0].reads
    products = pkm.sample_values(values.requires_grad_(), slots, x, "factored")
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(products.square().sum(), values, create_graph=True)


def test_leading_dimensions():
    values, slots, x, weights = make(50, 8, 12, 6)
    products, table = pkm.sample_values(values, slots, x), pkm.scatter_values(slots, weights, x, 50)
    shaped = slots.view(3, 4, 6).long(), x.view(3, 4, 8)
    assert torch.equal(pkm.sample_values(values, *shaped), products.view(3, 4, 6))
    again = pkm.scatter_values(shaped[0], weights.view(3, 4, 6), shaped[1], 50)
    assert torch.equal(again, table)
    assert torch.equal(pkm.sample_values(values, slots[0], x[0]), products[0])
    one = pkm.scatter_values(slots[0], weights[0], x[0], 50)
    assert torch.equal(one, pkm.scatter_values(slots[:1], weights[:1], x[:1], 50))


@pytest.mark.parametrize("width", [31, 32])
def test_same_bits_whatever_the_threads(width):
    values, slots, x, weights = make(300, width, 200, 64)
    slots[:, :8] = 3

    def run(threads):
        torch.set_num_threads(threads)
        sparse = pkm.scatter_values(slots, weights, x, 300, sparse=True)
        return [pkm.sample_values(values, slots, x), sparse.values(), sparse.indices()]

    threads = torch.get_num_threads()
    try:
        first = run(1)
        for more in (2, 3):
            assert all(torch.equal(one, other) for one, other in zip(first, run(more), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 31, 32])
def test_same_bits_wherever_in_memory_the_inputs_lie(width, dtype):
    values, slots, x, _ = make(64, width, 20, 16, dtype, dtype)

    def shifted(tensor, elements):
        """A copy that begins so many elements after an aligned address, as safetensors may."""
        moved = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
        return moved.copy_(tensor)

    expected = pkm.sample_values(values, slots, x)
    for elements in (1, 2, 3, 4):
        assert torch.equal(pkm.sample_values(shifted(values, elements), slots, x), expected)
        assert torch.equal(pkm.sample_values(values, slots, shifted(x, elements)), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_meta_tensors_have_the_shapes(device):
    values, slots, x, weights = (t.to(device) for t in make(20, 5, 7, 6))
    assert pkm.sample_values(values, slots, x).shape == (7, 6)
    assert pkm.scatter_values(slots, weights, x, 20).shape == (20, 5)
    assert pkm.gather_values(values, slots, weights).shape == (7, 5)
    assert pkm.scatter_values(slots, weights, x, 20, sparse=True).shape == (20, 5)


FORMS = {
    "contiguous": lambda v, s, x, w: (v, s, x, w),
    "strided": lambda v, s, x, w: (v.T.contiguous().T, s.repeat(1, 2)[:, ::2], x[:, :], w.T.mT),
    "expanded": lambda v, s, x, w: (
        v[:1].expand(30, 8), s[:1].expand(5, 6), x, w[:, :1].expand(5, 6)
    ),
    "no tokens": lambda v, s, x, w: (v, s[:0], x[:0], w[:0]),
    "no reads": lambda v, s, x, w: (v, s[:, :0], x, w[:, :0]),
    "no columns": lambda v, s, x, w: (v[:, :0], s, x[:, :0], w),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    values, slots, x, weights = FORMS[form](*make(30, 8, 5, 6))
    ops = torch.ops.pkm_triton
    opcheck(ops.sample_values.default, (values, slots, x, FLOAT32))
    opcheck(ops.scatter_values.default, (slots, weights, x, 30, FLOAT32))
    # The traced check knows no sparse tensors; test_integration covers them.
    utils = ["test_schema", "test_autograd_registration"]
    opcheck(ops.scatter_values_sparse.default, (slots, weights, x, 30, FLOAT32), test_utils=utils)


VALUES, SLOTS, X, WEIGHTS = make(20, 4, 3, 6)


@pytest.mark.parametrize(
    ("values", "slots", "x", "error", "message"),
    [
        (VALUES, SLOTS, X[:2], ValueError, r"x must have shape \[3, 4\] to go .*not \[2, 4\]"),
        (VALUES, SLOTS, X[:, :3], ValueError, r"x must have shape \[3, 4\]"),
        (VALUES, SLOTS, X.long(), TypeError, r"x has dtype torch\.int64"),
        (VALUES[0], SLOTS, X, ValueError, r"values must have shape \[K, d\], not \[4\]"),
        (VALUES, SLOTS.float(), X, TypeError, r"slots has dtype torch\.float32"),
        (VALUES, SLOTS + 20, X, ValueError, r"slots must lie in \[0, 20\)"),
        (VALUES, SLOTS, X.to("meta"), ValueError, "x on meta"),
        (VALUES.to_sparse(), SLOTS, X, TypeError, r"values has layout torch\.sparse_coo, but must"),
        (VALUES.tolist(), SLOTS, X, TypeError, "values must be a tensor"),
    ],
)
def test_wrong_calls_of_sample(values, slots, x, error, message):
    with pytest.raises(error, match=message):
        pkm.sample_values(values, slots, x)


@pytest.mark.parametrize("sparse", [False, True, "factored"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X[:2]}, ValueError, r"x must have shape \[3, d\] to go with slots \[3, 6\]"),
        ({"weights": WEIGHTS[:2]}, ValueError, "slots and weights must have the same shape"),
        ({"weights": WEIGHTS.bool()}, TypeError, r"weights has dtype torch\.bool"),
        ({"num_slots": 7}, ValueError, r"slots must lie in \[0, 7\)"),
        ({"num_slots": -1}, ValueError, "num_slots is -1"),
        ({"num_slots": 2**31}, ValueError, "num_slots is 2147483648, but at most"),
        ({"num_slots": 2.0}, TypeError, r"num_slots must be an integer, not 2\.0"),
        ({"x": X.to(torch.complex64)}, TypeError, r"x has dtype torch\.complex64"),
        ({"slots": SLOTS.to("meta")}, ValueError, "slots on meta"),
    ],
)
def test_wrong_calls_of_scatter(changed, error, message, sparse):
    call = {"slots": SLOTS.clamp(7, 19), "weights": WEIGHTS, "x": X, "num_slots": 20} | changed
    with pytest.raises(error, match=message):
        pkm.scatter_values(**call, sparse=sparse)


def test_wrong_form():
    with pytest.raises(ValueError, match="sparse is 'coo', but must be True, False or 'factored'"):
        pkm.scatter_values(SLOTS, WEIGHTS, X, 20, sparse="coo")
    with pytest.raises(ValueError, match="sparse_grad is 1, but must be True, False or 'factored'"):
        pkm.gather_values(VALUES, SLOTS, WEIGHTS, sparse_grad=1)
