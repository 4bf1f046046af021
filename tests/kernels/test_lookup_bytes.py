"""What the lookups move is what their formulas say, tensor by tensor."""

import dataclasses
import importlib

import pytest
import torch

from pkm_triton import kernels
from pkm_triton.kernels.chip import INTERPRETER, as_if
from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.points import Point

product = importlib.import_module("pkm_triton.kernels.product_key_topk")
flat = importlib.import_module("pkm_triton.kernels.flat_key_topk")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")

# The kernels' names of what the formulas name.
ARGUMENTS = {
    "query": "query_ptr",
    "keys": "keys_ptr",
    "scores": "scores_ptr",
    "slots": "slots_ptr",
    "lists": "list_ptr",
}


def shapes_for(path):
    """Shapes for few queries or for many, whatever their number: by a chip large or small."""
    return as_if(dataclasses.replace(INTERPRETER, multiprocessors=40 if path == "few" else 1))


def check(guard, formula):
    for name, argument in ARGUMENTS.items():
        counts = guard.argument_bytes.items()
        counted = sum(count for (_, each), count in counts if each == argument)
        if name == "lists":
            assert counted >= formula[name] > 0
        else:
            assert counted == pytest.approx(formula[name], rel=0.05), name


# T, H, d_q, N, k, and the dtype of the sub-keys; the interpreter keeps 64 elements of a query.
PRODUCT_CASES = [
    (3, 2, 96, 200, 20, torch.float32),
    (17, 1, 256, 130, 9, torch.bfloat16),
    (130, 1, 32, 128, 40, torch.float16),
    (2, 1, 16, 1100, 5, torch.float32),
    (40, 2, 16, 200, 70, torch.float32),
    (3, 1, 32, 400, 300, torch.bfloat16),
]


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("case", PRODUCT_CASES, ids=str)
def test_product(case, path, guard):
    num_tokens, heads, width, num_subkeys, top_k, dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = torch.randn(num_tokens, heads, width)
    subkeys = torch.randn(heads, 2, num_subkeys, width // 2).to(dtype)
    with shapes_for(path):
        kernels.product_key_topk(query, subkeys, top_k)
        check(guard, product.product_key_topk_bytes(query, subkeys, top_k))


FLAT_CASES = [
    (3, 2, 96, 700, 20, torch.float32),
    (130, 1, 64, 1100, 70, torch.bfloat16),
    (20, 1, 300, 200, 20, torch.float32),
]


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("case", FLAT_CASES, ids=str)
def test_flat(case, path, guard):
    num_tokens, heads, width, num_keys, top_k, dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = torch.randn(num_tokens, heads, width)
    keys = torch.randn(heads, num_keys, width).to(dtype)
    with shapes_for(path):
        kernels.flat_key_topk(query, keys, top_k)
        check(guard, flat.flat_key_topk_bytes(query, keys, top_k))


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("keys", ["product", "flat"])
def test_the_roofline_counts_what_cannot_be_spared(keys, path):
    # One block of tokens and one tile of keys: nothing but them is moved.
    point = Point(keys=keys, num_subkeys=64, top_k=8, heads=2, query_dim=32, tokens=16)
    query = torch.empty(16, 2, 32)
    with shapes_for(path):
        if keys == "product":
            formula = product.product_key_topk_bytes(query, torch.empty(2, 2, 64, 16), 8)
        else:
            point = dataclasses.replace(point, num_subkeys=8)
            formula = flat.flat_key_topk_bytes(query, torch.empty(2, 64, 32), 8)
    moved = sum(formula[name] for name in ("query", "keys", "scores", "slots"))
    # A first look reads the tile once more, and a tall block more tokens than there are.
    assert roofline.lookup_bytes(point) < moved
