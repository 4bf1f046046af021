import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import all_flat_scores, assert_distinct, assert_selects_exactly
from tolerance import assert_close_to_oracle
from torch.autograd import gradcheck
from torch.library import opcheck

import pkm_triton as pkm


@given(
    num_tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    num_keys=st.integers(1, 300),
    width=st.integers(1, 9),
    top_k=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_exact_with_ties(num_tokens, heads, num_keys, width, top_k, seed):
    top_k = min(top_k, num_keys)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-3, 4, (num_tokens, heads, width), generator=generator).float()
    keys = torch.randint(-3, 4, (heads, num_keys, width), generator=generator).float()
    scores, slots = pkm.flat_key_topk(query, keys, top_k)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))


@pytest.mark.parametrize("block", [7, 64], ids=lambda n: f"block{n}")
def test_streamed_in_blocks(monkeypatch, block):
    module = importlib.import_module("pkm_triton.reference.flat_key_topk")
    chunks = importlib.import_module("pkm_triton.reference.chunks")
    monkeypatch.setattr(module, "KEYS_AT_A_TIME", block)
    monkeypatch.setattr(chunks, "MAX_TEMPORARY_ELEMENTS", 5 * block)
    query = torch.randint(-3, 4, (13, 2, 6)).float()
    keys = torch.randint(-3, 4, (2, 300, 6)).float()
    scores, slots = pkm.flat_key_topk(query, keys, 10)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_against_the_oracle(dtype):
    query, keys = torch.randn(33, 2, 36).to(dtype), torch.randn(2, 1500, 36).to(dtype)
    scores, slots = pkm.flat_key_topk(query, keys, 16)
    every = all_flat_scores(query, keys)
    best = every.topk(16).values
    plain = torch.einsum("thd,hkd->thk", query.float(), keys.float()).topk(16).values
    assert_close_to_oracle(scores, best, plain)
    assert_close_to_oracle(every.gather(-1, slots.long()).float(), best, best.float())
    assert_distinct(slots, 1500)


def test_agrees_with_product_keys():
    """The product keys written out are flat keys (paper 3.1)."""
    query = torch.randint(-3, 4, (9, 2, 8)).float()
    subkeys = torch.randint(-3, 4, (2, 2, 12, 4)).float()
    rows = subkeys[:, 0, :, None].expand(2, 12, 12, 4)
    columns = subkeys[:, 1, None].expand(2, 12, 12, 4)
    keys = torch.cat([rows, columns], dim=-1).flatten(1, 2)
    flat_scores, _ = pkm.flat_key_topk(query, keys, 20)
    scores, _ = pkm.product_key_topk(query, subkeys, 20)
    assert torch.equal(flat_scores, scores)


def test_nan_stays_with_its_query():
    query, keys = torch.randn(4, 2, 8), torch.randn(2, 500, 8)
    clean, _ = pkm.flat_key_topk(query, keys, 5)
    query[1, 0, 3] = torch.nan
    scores, slots = pkm.flat_key_topk(query, keys, 5)
    assert scores[1, 0].isnan().all()
    assert_distinct(slots, 500)
    assert torch.equal(scores[2:], clean[2:])
    assert torch.equal(scores[1, 1], clean[1, 1])


def test_gradcheck():
    query = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda q, c: pkm.flat_key_topk(q, c, 4)[0], (query, keys))


OPCHECK_INPUTS = {
    "contiguous": lambda: (torch.randn(6, 2, 8), torch.randn(2, 20, 8)),
    "sliced": lambda: (torch.randn(6, 2, 16)[..., ::2], torch.randn(2, 40, 8)[:, 3:23]),
    "expanded": lambda: (
        torch.randn(1, 2, 8).expand(6, 2, 8),
        torch.randn(1, 20, 8).expand(2, -1, -1),
    ),
    "transposed": lambda: (torch.randn(2, 6, 8).transpose(0, 1), torch.randn(2, 8, 20).mT),
    "empty": lambda: (torch.empty(0, 2, 8), torch.randn(2, 20, 8)),
}


@pytest.mark.parametrize("form", OPCHECK_INPUTS)
def test_opcheck(form):
    query, keys = OPCHECK_INPUTS[form]()
    scores, slots = pkm.flat_key_topk(query, keys, 5)
    opcheck(torch.ops.pkm_triton.flat_key_topk.default, (query, keys, 5))
    opcheck(
        torch.ops.pkm_triton.flat_key_topk_backward.default,
        (torch.randn_like(scores), query, keys, slots),
    )
