import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import all_product_scores, assert_distinct, assert_selects_exactly
from tolerance import assert_close_to_oracle
from torch.autograd import gradcheck
from torch.library import opcheck

import pkm_triton as pkm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_integers(*shape, dtype=torch.float32, low=-3, high=4, seed=0):
    """Values whose products and sums are exact in every dtype: ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


@given(
    num_tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    num_subkeys=st.integers(1, 40),
    half_width=st.integers(1, 9),
    top_k=st.integers(1, 60),
    duplicates=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_with_ties(num_tokens, heads, num_subkeys, half_width, top_k, duplicates, seed):
    top_k = min(top_k, num_subkeys**2)
    query = small_integers(num_tokens, heads, 2 * half_width, seed=seed)
    subkeys = small_integers(heads, 2, num_subkeys, half_width, seed=seed + 100)
    if duplicates:
        subkeys[:, :, num_subkeys // 2 :] = subkeys[:, :, :1]
    scores, slots = pkm.product_key_topk(query, subkeys, top_k)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 16, 32, 100, 144])
def test_every_k_of_a_small_memory(top_k):
    query, subkeys = torch.randn(5, 3, 10).double(), torch.randn(3, 2, 12, 5).double()
    scores, slots = pkm.product_key_topk(query, subkeys, top_k)
    every = all_product_scores(query, subkeys)
    torch.testing.assert_close(scores, every.topk(top_k).values)
    torch.testing.assert_close(every.gather(-1, slots.long()), scores)
    assert_distinct(slots, 144)


@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_subkeys", [63, 1030], ids=lambda n: f"N{n}")
def test_dtypes_against_the_oracle(query_dtype, key_dtype, num_subkeys):
    query = torch.randn(33, 2, 36).to(query_dtype)
    subkeys = torch.randn(2, 2, num_subkeys, 18).to(key_dtype)
    scores, slots = pkm.product_key_topk(query, subkeys, 16)
    every = all_product_scores(query, subkeys)
    wide = query.float(), subkeys.float()
    first = torch.einsum("thd,hnd->thn", wide[0][..., :18], wide[1][:, 0])
    second = torch.einsum("thd,hnd->thn", wide[0][..., 18:], wide[1][:, 1])
    same_precision = (first[..., :, None] + second[..., None, :]).flatten(-2)
    assert scores.dtype == torch.float32
    best = every.topk(16).values
    assert_close_to_oracle(scores, best, same_precision.topk(16).values)
    assert_close_to_oracle(every.gather(-1, slots.long()).float(), best, best.float())
    assert_distinct(slots, num_subkeys**2)


@pytest.mark.slow
def test_exact_over_a_million_slots():
    """|C| = 1024, k = 32, as large as the paper goes, every slot scored by brute force."""
    query = small_integers(24, 2, 64, low=-8, high=9, seed=1)
    subkeys = small_integers(2, 2, 1024, 32, low=-8, high=9, seed=2)
    scores, slots = pkm.product_key_topk(query, subkeys, 32)
    for start in range(0, 24, 8):
        part = slice(start, start + 8)
        every = all_product_scores(query[part], subkeys)
        assert_selects_exactly(scores[part], slots[part], every)


def test_leading_dimensions_and_no_tokens():
    subkeys = torch.randn(2, 2, 9, 4)
    query = torch.randn(3, 5, 2, 8)
    scores, slots = pkm.product_key_topk(query, subkeys, 6)
    flat_scores, flat_slots = pkm.product_key_topk(query.flatten(0, 1), subkeys, 6)
    assert torch.equal(scores, flat_scores.view(3, 5, 2, 6))
    assert torch.equal(slots, flat_slots.view(3, 5, 2, 6))
    one_scores, _ = pkm.product_key_topk(query[0, 0], subkeys, 6)
    torch.testing.assert_close(one_scores, scores[0, 0])
    query = torch.empty(0, 3, 2, 8, requires_grad=True)
    scores, slots = pkm.product_key_topk(query, subkeys, 6)
    assert scores.shape == slots.shape == (0, 3, 2, 6)
    scores.sum().backward()
    assert query.grad is not None
    assert query.grad.shape == query.shape


def test_infinities_rank_as_numbers_do():
    query = torch.ones(1, 1, 2)
    subkeys = torch.tensor([[[3.0], [torch.inf], [-torch.inf]], [[1.0], [-torch.inf], [2.0]]])[None]
    scores, slots = pkm.product_key_topk(query, subkeys, 9)
    # Slot 3 i + j; +inf and -inf add up to -inf: a slot that either half rules out is ruled out.
    assert scores[0, 0].tolist() == [torch.inf] * 2 + [5, 4] + [-torch.inf] * 5
    assert set(slots[0, 0, :2].tolist()) == {3, 5}
    assert slots[0, 0, 2:4].tolist() == [2, 0]
    assert_distinct(slots, 9)


@given(
    num_subkeys=st.integers(1, 12),
    top_k=st.integers(1, 30),
    seed=st.integers(0, 200),
)
def test_exact_with_infinities(num_subkeys, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-torch.inf, -1.0, 0.0, 2.0, torch.inf])
    halves = choices[torch.randint(0, 5, (2, num_subkeys, 1), generator=generator)]
    top_k = min(top_k, num_subkeys**2)
    scores, slots = pkm.product_key_topk(torch.ones(2, 1, 2), halves[None], top_k)
    every = (halves[0] + halves[1].T).flatten().nan_to_num(-torch.inf, torch.inf, -torch.inf)
    expected = every.topk(top_k).values
    for token in range(2):
        assert torch.equal(scores[token, 0], expected)
        assert torch.equal(every[slots[token, 0].long()], expected)
    assert_distinct(slots, num_subkeys**2)


@pytest.mark.parametrize("width", [20, 1024], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("half", [0, 1], ids=["first half", "second half"])
def test_nan_stays_with_its_query(half, width):
    query, subkeys = torch.randn(40, 2, 8), torch.randn(2, 2, width, 4)
    clean_scores, clean_slots = pkm.product_key_topk(query, subkeys, 5)
    query[1, 0, 4 * half] = torch.nan
    scores, slots = pkm.product_key_topk(query, subkeys, 5)
    assert scores[1, 0].isnan().all()
    assert_distinct(slots, width**2)
    others = torch.ones(40, 2, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(scores[others], clean_scores[others])
    assert torch.equal(slots[others], clean_slots[others])


def test_nan_in_a_subkey_is_loud():
    query, subkeys = torch.randn(3, 2, 8), torch.randn(2, 2, 20, 4)
    subkeys[1, 0, 7, 2] = torch.nan
    scores, slots = pkm.product_key_topk(query, subkeys, 5)
    assert scores[:, 1].isnan().all()
    assert not scores[:, 0].isnan().any()
    assert_distinct(slots, 400)


def test_chunks_do_not_change_the_selection(monkeypatch):
    query, subkeys = small_integers(37, 3, 12), small_integers(3, 2, 50, 6, seed=1)
    whole = pkm.product_key_topk(query, subkeys, 9)
    chunks = importlib.import_module("pkm_triton.reference.chunks")
    monkeypatch.setattr(chunks, "MAX_TEMPORARY_ELEMENTS", 3 * 2 * 50 * 5)
    in_chunks = pkm.product_key_topk(query, subkeys, 9)
    assert torch.equal(whole[0], in_chunks[0])
    assert torch.equal(whole[1], in_chunks[1])


def test_strided_inputs_and_the_same_bits_again():
    query = torch.randn(8, 3, 20)[..., 2:12]
    subkeys = torch.randn(3, 2, 5, 16).transpose(-1, -2)
    first = pkm.product_key_topk(query, subkeys, 7)
    again = pkm.product_key_topk(query, subkeys, 7)
    dense = pkm.product_key_topk(query.clone(), subkeys.contiguous(), 7)
    for other in (again, dense):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("op", [pkm.product_key_topk, pkm.flat_key_topk])
def test_full_float32_whatever_the_global_setting(op, monkeypatch):
    """A setting that allows bfloat16 products would change which slots win.

    It is the process's: a lookup may neither follow it nor, under other threads, change it.
    """
    query = torch.randn(512, 2, 512)
    keys = torch.randn((2, 2, 300, 256) if op is pkm.product_key_topk else (2, 600, 512))
    expected = op(query, keys, 8)
    previous = torch.get_float32_matmul_precision()
    multiplied = []

    def watched(run):
        def multiply(*args):
            settings = torch.backends.mkldnn.matmul.fp32_precision
            multiplied.append((torch.get_float32_matmul_precision(), settings, args[0].dtype))
            return run(*args)

        return multiply

    try:
        torch.set_float32_matmul_precision("medium")
        setting = torch.backends.mkldnn.matmul.fp32_precision
        for name in ("mm", "bmm"):
            monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
        scores, slots = op(query, keys, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(previous)
    # The setting as the user left it, and no product that it could reach.
    assert set(multiplied) == {("medium", setting, torch.float64)}
    torch.testing.assert_close(scores, expected[0])
    assert (slots == expected[1]).float().mean() > 0.999


class TestGradients:
    @pytest.mark.parametrize("top_k", [1, 4, 25])
    def test_gradcheck(self, top_k):
        query = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
        subkeys = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda q, c: pkm.product_key_topk(q, c, top_k)[0], (query, subkeys))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_the_oracle(self, dtype):
        query = torch.randn(50, 3, 20).to(dtype).requires_grad_()
        subkeys = torch.randn(3, 2, 31, 10).to(dtype).requires_grad_()
        scores, slots = pkm.product_key_topk(query, subkeys, 12)
        grad = torch.randn_like(scores)
        scores.backward(grad)

        def brute_force(cast):
            leaves = [
                cast(query.detach()).requires_grad_(),
                cast(subkeys.detach()).requires_grad_(),
            ]
            first, second = leaves[0].chunk(2, dim=-1)
            rows = torch.einsum("thd,hnd->thn", first, leaves[1][:, 0])
            columns = torch.einsum("thd,hnd->thn", second, leaves[1][:, 1])
            every = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
            every.gather(-1, slots.long()).backward(grad.to(every.dtype))
            return [leaf.grad for leaf in leaves]

        oracle, same = brute_force(torch.Tensor.double), brute_force(torch.Tensor.float)
        for name, leaf, exact, plain in zip(
            ("query", "subkeys"), (query, subkeys), oracle, same, strict=True
        ):
            assert leaf.grad.dtype == dtype, name
            assert_close_to_oracle(leaf.grad, exact, plain.to(dtype))

    def test_chunks_do_not_change_gradients(self, monkeypatch):
        query = small_integers(37, 3, 12).requires_grad_()
        subkeys = small_integers(3, 2, 50, 6, seed=1).requires_grad_()

        def grads():
            scores, _ = pkm.product_key_topk(query, subkeys, 9)
            return torch.autograd.grad(scores.sum(), (query, subkeys))

        whole = grads()
        chunks = importlib.import_module("pkm_triton.reference.chunks")
        monkeypatch.setattr(chunks, "MAX_TEMPORARY_ELEMENTS", 3 * 2 * 50 * 5)
        for name, one, other in zip(("query", "subkeys"), whole, grads(), strict=True):
            assert torch.equal(one, other), name


OPCHECK_INPUTS = {
    "contiguous": lambda: (torch.randn(6, 2, 8), torch.randn(2, 2, 7, 4)),
    "sliced": lambda: (torch.randn(6, 2, 16)[..., ::2], torch.randn(2, 2, 14, 4)[:, :, 3:10]),
    "expanded": lambda: (
        torch.randn(1, 2, 8).expand(6, 2, 8),
        torch.randn(1, 2, 7, 4).expand(2, -1, -1, -1),
    ),
    "transposed": lambda: (torch.randn(2, 6, 8).transpose(0, 1), torch.randn(2, 2, 4, 7).mT),
    "empty": lambda: (torch.empty(0, 2, 8), torch.randn(2, 2, 7, 4)),
}


@pytest.mark.parametrize("form", OPCHECK_INPUTS)
def test_opcheck(form):
    opcheck(torch.ops.pkm_triton.product_key_topk.default, (*OPCHECK_INPUTS[form](), 5))


@pytest.mark.parametrize("form", OPCHECK_INPUTS)
def test_opcheck_backward(form):
    query, subkeys = OPCHECK_INPUTS[form]()
    scores, slots = pkm.product_key_topk(query, subkeys, 5)
    opcheck(
        torch.ops.pkm_triton.product_key_topk_backward.default,
        (torch.randn_like(scores), query, subkeys, slots),
    )
