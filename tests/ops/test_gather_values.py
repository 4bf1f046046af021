import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gather, scatter
from tolerance import assert_close_to_oracle
from torch import nn
from torch.autograd import gradcheck
from torch.library import opcheck

import pkm_triton as pkm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(num_slots, width, num_tokens, reads, dtype=torch.float32, weight_dtype=torch.float32):
    values = torch.randn(num_slots, width).to(dtype)
    slots = torch.randint(0, num_slots, (num_tokens, reads), dtype=torch.int32)
    weights = torch.rand(num_tokens, reads).to(weight_dtype)
    return values, slots, weights


@given(
    num_slots=st.integers(1, 50),
    width=st.integers(1, 33),
    num_tokens=st.integers(0, 9),
    reads=st.integers(0, 40),
    sparse_grad=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sizes(num_slots, width, num_tokens, reads, sparse_grad, seed):
    torch.manual_seed(seed)
    values, slots, weights = table(num_slots, width, num_tokens, reads)
    values.requires_grad_()
    weights.requires_grad_()
    out = pkm.gather_values(values, slots, weights, sparse_grad)
    torch.testing.assert_close(out.double(), gather(values, slots, weights), atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(out)
    out.backward(grad)
    leaves = values.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    gather(leaves[0], slots, leaves[1]).backward(grad.double())
    dense = values.grad.to_dense()
    torch.testing.assert_close(dense.double(), leaves[0].grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.grad.double(), leaves[1].grad, atol=1e-4, rtol=1e-4)
    assert values.grad.is_sparse == sparse_grad


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_against_the_oracle(dtype, weight_dtype, sparse_grad):
    values, slots, weights = table(200, 60, 31, 24, dtype, weight_dtype)
    slots[3] = slots[3, 0]  # one row many times in one token
    grad = torch.randn(31, 60).to(dtype)

    def run(op, cast_values, cast_weights):
        leaves = [cast_values(values).requires_grad_(), cast_weights(weights).requires_grad_()]
        out = op(leaves[0], slots, leaves[1])
        out.backward(grad.to(out.dtype))
        return {"out": out.detach(), "values": leaves[0].grad, "weights": leaves[1].grad}

    def bag(table, slots, weights):
        # What the same call costs in plain PyTorch, which wants one dtype.
        return nn.functional.embedding_bag(
            slots, table, per_sample_weights=weights.to(table.dtype), mode="sum"
        )

    ours = run(lambda v, s, w: pkm.gather_values(v, s, w, sparse_grad), torch.clone, torch.clone)
    oracle = run(gather, torch.Tensor.double, torch.Tensor.double)
    plain = run(bag, torch.clone, torch.clone)
    for name in ours:
        assert_close_to_oracle(ours[name].to_dense(), oracle[name], plain[name])
    assert ours["out"].dtype == ours["values"].dtype == dtype
    assert ours["weights"].dtype == weight_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_keep_their_precision(dtype):
    """As if the weights had not been rounded to the table's dtype, which costs 8 times as much."""
    values, slots, weights = table(200, 64, 64, 128, dtype)
    oracle = gather(values, slots, weights)
    error = (pkm.gather_values(values, slots, weights).double() - oracle).abs().max()
    rounding = (oracle.to(dtype).double() - oracle).abs().max()
    assert error <= 1.1 * rounding


@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-5, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_tables_with_weights_of_any_size(dtype, size):
    """Forward, and in the table's gradient, as exact as the table's dtype allows."""
    values, slots, weights = table(100, 8, 3, 512, dtype)
    weights *= size
    small = min(1.0, 1e-3 / size) if size else 1.0
    values = (values.float() * small).to(dtype).requires_grad_()
    out = pkm.gather_values(values, slots, weights)
    exact = gather(values, slots, weights)
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 1.1 * rounding
    grad = torch.randn(3, 8).mul(small).to(dtype)
    (found,) = torch.autograd.grad(out, values, grad)
    exact = scatter(slots, weights, grad, 100)
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 1.1 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_tables_with_infinite_weights(dtype):
    values = torch.tensor([[1.0, -1.0], [0.5, 2.0]]).to(dtype)
    slots, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[torch.inf, 1.0], [1.0, 1.0]])
    out = pkm.gather_values(values, slots, weights)
    assert out.tolist() == [[torch.inf, -torch.inf], [1.5, 1.0]]


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_widened_a_few_rows_at_a_time(monkeypatch, sparse_grad):
    """In half precision, whatever the number of rows that are widened together."""
    values, slots, weights = table(60, 7, 40, 9, torch.float16)
    weights *= 1e6
    values = (values.float() * 1e-4).half().requires_grad_()
    weights.requires_grad_()

    def run():
        out = pkm.gather_values(values, slots, weights, sparse_grad)
        grads = torch.autograd.grad(out.float().sum(), (values, weights))
        return out, grads[0].to_dense(), grads[1]

    whole = run()
    for name in ("gather_values", "scatter_values", "sample_values"):
        module = importlib.import_module(f"pkm_triton.reference.{name}")
        size = "CACHED_ELEMENTS" if name == "sample_values" else "WIDENED_ELEMENTS"
        monkeypatch.setattr(module, size, 9 * 7 * 4)
    for name, one, other in zip(("out", "values", "weights"), whole, run(), strict=True):
        assert torch.equal(one, other), name


def test_equals_embedding_bag():
    values, slots, weights = table(500, 48, 40, 32)
    bag = nn.EmbeddingBag.from_pretrained(values, mode="sum")
    assert torch.equal(
        pkm.gather_values(values, slots, weights), bag(slots, per_sample_weights=weights)
    )


def test_leading_dimensions():
    values, slots, weights = table(50, 8, 12, 6)
    flat = pkm.gather_values(values, slots, weights)
    shaped = pkm.gather_values(values, slots.view(3, 4, 6).long(), weights.view(3, 4, 6))
    assert torch.equal(shaped, flat.view(3, 4, 8))
    assert torch.equal(pkm.gather_values(values, slots[0], weights[0]), flat[0])


def test_linear_and_adjoint():
    """<gather(V), G> = <V, scatter(G)>, and the gather is linear in each factor."""
    values, slots, weights = (
        t.double() if t.is_floating_point() else t for t in table(40, 9, 20, 7)
    )
    values.requires_grad_()
    grad = torch.randn(20, 9, dtype=torch.float64)
    out = pkm.gather_values(values, slots, weights)
    (scattered,) = torch.autograd.grad(out, values, grad)
    torch.testing.assert_close((out * grad).sum(), (values * scattered).sum())
    other = torch.randn_like(values)
    torch.testing.assert_close(
        pkm.gather_values(values + 2 * other, slots, weights),
        out + 2 * pkm.gather_values(other, slots, weights),
    )
    torch.testing.assert_close(pkm.gather_values(values, slots, 3 * weights), 3 * out)


def test_gradcheck():
    values = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    slots = torch.randint(0, 12, (4, 6))
    weights = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, w: pkm.gather_values(v, slots, w), (values, weights))


def test_sparse_gradient_is_coalesced_and_equals_the_dense_one():
    values, slots, weights = table(1000, 16, 20, 8)
    slots[:10] = 7  # a hot row
    values.requires_grad_()
    out = pkm.gather_values(values, slots, weights, sparse_grad=True)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, values, upstream)
    assert grad.is_coalesced()
    assert torch.equal(grad.indices()[0], slots.unique().long())
    dense_out = pkm.gather_values(values, slots, weights)
    (dense,) = torch.autograd.grad(dense_out, values, upstream)
    assert torch.equal(grad.to_dense(), dense)


def test_a_stored_gradient_is_marked_coalesced_if_it_is():
    values, slots, weights = table(30, 4, 5, 6)
    values.requires_grad_()
    pkm.gather_values(values, slots, weights, sparse_grad=True).sum().backward()
    first = values.grad
    assert first.is_coalesced()
    assert torch.equal(first.indices()[0], slots.unique().long())
    for tokens in (slots.flip(1), slots[:1]):  # added to, in the same pass and in another
        values.grad = None
        passes = (slots, weights), (tokens, weights[: len(tokens)])
        sum(pkm.gather_values(values, *p, sparse_grad=True).sum() for p in passes).backward()
        together = values.grad
        values.grad = None
        for inputs in passes:
            pkm.gather_values(values, *inputs, sparse_grad=True).sum().backward()
        for grad in (together, values.grad):
            rows = grad._indices()[0]
            assert not grad.is_coalesced() or (rows.diff() > 0).all()
            torch.testing.assert_close(grad.to_dense(), together.to_dense())
    twice = torch.tensor([[2, 2]])
    values.grad = torch.sparse_coo_tensor(twice, torch.ones(2, 4), (30, 4), check_invariants=True)
    pkm.gather_values(values, slots, weights, sparse_grad=True).sum().backward()
    assert not values.grad.is_coalesced()
    torch.testing.assert_close(values.grad.to_dense()[2], first.to_dense()[2] + 2)
    assert torch.autograd.grad(
        pkm.gather_values(values, slots, weights, sparse_grad=True).sum(), values
    )[0].is_coalesced()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_same_bits_again_whatever_the_threads(sparse_grad):
    values, slots, weights = table(300, 32, 200, 64)
    slots[:, :8] = 3
    values.requires_grad_()
    weights.requires_grad_()

    def run():
        out = pkm.gather_values(values, slots, weights, sparse_grad)
        grads = torch.autograd.grad(out.square().sum(), (values, weights))
        return [out, grads[0].to_dense(), grads[1]]

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(1)
        for name, one, other in zip(("out", "values", "weights"), first, run(), strict=True):
            assert torch.equal(one, other), name
    finally:
        torch.set_num_threads(threads)


def test_only_what_is_needed():
    values, slots, weights = table(30, 4, 5, 3)
    weights.requires_grad_()
    pkm.gather_values(values, slots, weights, sparse_grad=True).sum().backward()
    assert weights.grad is not None
    values.requires_grad_()
    pkm.gather_values(values, slots, weights.detach()).sum().backward()
    assert values.grad is not None


OPCHECK_INPUTS = {
    "contiguous": lambda v, s, w: (v, s, w),
    "sliced": lambda v, s, w: (torch.cat([v, v], 1)[:, ::2], torch.cat([s, s], 1)[:, 1:7], w),
    "expanded": lambda v, s, w: (v[:1].expand(30, 8), s[:1].expand(5, 6), w[:, :1].expand(5, 6)),
    "transposed": lambda v, s, w: (v.T.contiguous().T, s.T.contiguous().T, w.T.contiguous().T),
    "no tokens": lambda v, s, w: (v, s[:0], w[:0]),
    "no reads": lambda v, s, w: (v, s[:, :0], w[:, :0]),
}


@pytest.mark.parametrize("form", OPCHECK_INPUTS)
def test_opcheck(form):
    inputs = OPCHECK_INPUTS[form](*table(30, 8, 5, 6))
    operator = torch.ops.pkm_triton.gather_values.default
    opcheck(operator, (*inputs, torch.float32))
    opcheck(operator, (*inputs, torch.float32, torch.randn(8, inputs[1].shape[0]).T))


@pytest.mark.parametrize("form", OPCHECK_INPUTS)
def test_opcheck_backward(form):
    values, slots, weights = OPCHECK_INPUTS[form](*table(30, 8, 5, 6))
    grad = torch.randn(slots.shape[0], 8)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(
            torch.ops.pkm_triton.gather_values_backward.default,
            (grad, values, slots, weights, *needs),
        )
    opcheck(
        torch.ops.pkm_triton.gather_values_backward_sparse.default,
        (grad, values, slots, weights, True),
    )
