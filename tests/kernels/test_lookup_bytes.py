"""What the lookups move is what their formulas say, tensor by tensor."""

import dataclasses
import importlib

import pytest
import torch

from pkm_triton import kernels
from pkm_triton.kernels import launch
from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.points import Point

product = importlib.import_module("pkm_triton.kernels.product_key_topk")
flat = importlib.import_module("pkm_triton.kernels.flat_key_topk")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")

# The kernels' names of what the formulas name.
ARGUMENTS = {
    "query": ("query_ptr",),
    "keys": ("keys_ptr", "subkeys_ptr"),
    "parts": ("parts_ptr",),
    "units": ("units_ptr",),
    "part": ("part_ptr",),
    "halves": ("half_scores_ptr", "half_slots_ptr"),
    "scores": ("scores_ptr",),
    "slots": ("slots_ptr",),
    "lists": ("list_ptr",),
}


def shapes_for(monkeypatch, path):
    """Shapes for few queries or for many, whatever their number: by a chip large or small."""
    count = 1 << 20 if path == "few" else 1
    chip = dataclasses.replace(launch.INTERPRETER, multiprocessors=count)
    monkeypatch.setattr(launch, "chip", lambda device: chip)


def check(guard, formula):
    for name, arguments in ARGUMENTS.items():
        counts = guard.argument_bytes.items()
        counted = sum(count for (_, argument), count in counts if argument in arguments)
        if name == "lists" and name in formula:
            assert 0 < counted <= formula[name]
        else:
            assert counted == pytest.approx(formula.get(name, 0), rel=0.05), name


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
def test_product(case, path, monkeypatch, guard):
    shapes_for(monkeypatch, path)
    num_tokens, heads, width, num_subkeys, top_k, dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = torch.randn(num_tokens, heads, width)
    subkeys = torch.randn(heads, 2, num_subkeys, width // 2).to(dtype)
    kernels.product_key_topk(query, subkeys, top_k)
    check(guard, product.product_key_topk_bytes(query, subkeys, top_k))


FLAT_CASES = [
    (3, 2, 96, 700, 20, torch.float32),
    (130, 1, 64, 1100, 70, torch.bfloat16),
    (20, 1, 300, 200, 20, torch.float32),
]


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("case", FLAT_CASES, ids=str)
def test_flat(case, path, monkeypatch, guard):
    shapes_for(monkeypatch, path)
    num_tokens, heads, width, num_keys, top_k, dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = torch.randn(num_tokens, heads, width)
    keys = torch.randn(heads, num_keys, width).to(dtype)
    kernels.flat_key_topk(query, keys, top_k)
    check(guard, flat.flat_key_topk_bytes(query, keys, top_k))


def test_lists_stay_below_the_bound_where_every_key_is_appended(monkeypatch, guard):
    shapes_for(monkeypatch, "many")
    query, keys = torch.ones(1, 1, 1), torch.arange(2500.0).view(1, 2500, 1)
    kernels.flat_key_topk(query, keys, 4)
    formula = flat.flat_key_topk_bytes(query, keys, 4)
    check(guard, formula)
    # Every key is written, and nearly all are sorted.
    assert guard.argument_bytes["flat_key_topk_kernel", "list_ptr"] > 2500 * 8


def test_lists_stay_below_the_bound_where_narrow_keys_do_not_do(monkeypatch, guard):
    shapes_for(monkeypatch, "many")
    query = torch.ones(20, 1, 2, dtype=torch.bfloat16)
    subkeys = torch.logspace(-30, 30, 200).view(1, 1, 200, 1).repeat(1, 2, 1, 1).bfloat16()
    kernels.product_key_topk(query, subkeys, 32)
    formula = product.product_key_topk_bytes(query, subkeys, 32)
    assert 0 < guard.argument_bytes["product_key_topk_kernel", "list_ptr"] <= formula["lists"]


@pytest.mark.parametrize("path", ["few", "many"])
@pytest.mark.parametrize("keys", ["product", "flat"])
def test_the_roofline_counts_what_cannot_be_spared(keys, path, monkeypatch):
    # One block of tokens and, for few of them, one tile of keys: nothing is moved twice.
    shapes_for(monkeypatch, path)
    point = Point(keys=keys, num_subkeys=8, top_k=8, heads=2, query_dim=32, tokens=16)
    query = torch.empty(16, 2, 32)
    if keys == "product":
        formula = product.product_key_topk_bytes(query, torch.empty(2, 2, 8, 16), 8)
    else:
        formula = flat.flat_key_topk_bytes(query, torch.empty(2, 64, 32), 8)
    moved = sum(formula[name] for name in ("query", "keys", "scores", "slots"))
    compulsory = roofline.lookup_bytes(point)
    if path == "few":
        assert moved == compulsory
    else:
        assert compulsory < moved
