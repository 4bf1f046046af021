"""Planted bugs: each must be caught by the check named beside it."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from mutation import is_caught, plant
from oracle import all_product_scores, assert_selects_exactly, gather

from pkm_triton import kernels

# Infinite sub-keys times the zeros of absent rows.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def small_integers(*shape):
    return torch.randint(-4, 5, shape).float()


def on_chip(mutant, multiprocessors):
    """Have the kernels choose shapes for many queries, on a small chip, or for few, on a large."""
    chip = importlib.import_module(f"{mutant.__name__}.chip")
    chip.INTERPRETER = dataclasses.replace(chip.INTERPRETER, multiprocessors=multiprocessors)
    return mutant


@pytest.fixture(autouse=True)
def _restored_chip(monkeypatch):
    chip = importlib.import_module(f"{kernels.__name__}.chip")
    monkeypatch.setattr(chip, "INTERPRETER", chip.INTERPRETER)


def check_ragged_gather(mutant):
    values, weights = torch.randn(12, 20), torch.rand(40, 5)
    slots = torch.randint(0, 12, (40, 5), dtype=torch.int32)
    out = mutant.gather_values(values, slots, weights)
    torch.testing.assert_close(out.double(), gather(values, slots, weights), rtol=1e-5, atol=1e-5)


def check_slot_out_of_range(mutant):
    slots = torch.tensor([[1, 12]], dtype=torch.int32)
    assert mutant.gather_values(torch.ones(12, 16), slots, torch.ones(1, 2)).isnan().all()


def check_table_past_int32(mutant):
    # Pages that nobody touches take no memory.
    values = torch.empty((1 << 21) + 8, 1024, dtype=torch.bfloat16)
    values[-1] = 3
    slots = torch.full((1, 1), values.shape[0] - 1, dtype=torch.int32)
    assert (mutant.gather_values(values, slots, torch.ones(1, 1)) == 3).all()


def check_product_with_ties(mutant):
    # Of bfloat16, for one launch: float32 takes two.
    query, subkeys = small_integers(3, 1, 8).bfloat16(), small_integers(1, 2, 40, 4).bfloat16()
    scores, slots = on_chip(mutant, 1).product_key_topk(query, subkeys, 9)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def distinct_scores():
    # Digits of base 200: no two slots score the same, and every rank counts.
    subkeys = torch.stack([torch.randperm(200) * 200, torch.randperm(200)]).float()
    subkeys = subkeys.view(1, 2, 200, 1)
    return torch.ones(2, 1, 2), subkeys


def check_product_of_distinct_scores(mutant):
    query, subkeys = distinct_scores()
    scores, slots = on_chip(mutant, 1).product_key_topk(query, subkeys, 12)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def check_few_of_distinct_scores(mutant):
    query, subkeys = distinct_scores()
    scores, slots = on_chip(mutant, 40).product_key_topk(query, subkeys, 12)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def check_flat_of_distinct_scores(mutant):
    keys = torch.randperm(600).float().view(1, 600, 1)
    scores, _ = on_chip(mutant, 1).flat_key_topk(torch.ones(20, 1, 1), keys, 30)
    assert torch.equal(scores[0, 0], torch.arange(599.0, 569, -1))


def check_flat_of_equal_scores(mutant):
    keys = torch.randn(1, 320, 2)
    scores, slots = on_chip(mutant, 1).flat_key_topk(torch.zeros(1, 1, 2), keys, 5)
    assert_selects_exactly(scores, slots, torch.zeros(1, 1, 320).double())


def check_infinities(mutant):
    subkeys = torch.tensor([torch.inf, 0, -torch.inf]).view(1, 1, 3, 1).expand(1, 2, 3, 1)
    for multiprocessors in (1, 40):
        on_chip(mutant, multiprocessors)
        scores, _ = mutant.product_key_topk(torch.ones(1, 1, 2), subkeys.contiguous(), 9)
        assert scores.flatten().tolist() == [torch.inf] * 3 + [0] + [-torch.inf] * 5


def check_precision_is_stated(mutant):
    # Only a GPU multiplies float32 in tf32 by default; the interpreter would not show it.
    for file in ("select/scoring.py",):
        source = (Path(mutant.__file__).parent / file).read_text()
        assert source.count("tl.dot(") == source.count("input_precision=PRECISION") > 0


MUTATIONS = {
    "mask of columns dropped": (
        "gather_values.py", "& (column < D_V)[None, :]", "& (column >= 0)[None, :]",
        check_ragged_gather,
    ),
    "offset in 32 bits": (
        "gather_values.py", "slot.to(tl.int64)[:, None] * D_V", "slot[:, None] * D_V",
        check_table_past_int32,
    ),
    "wrong stride of the output": (
        "gather_values.py", "out_ptr + token * D_V", "out_ptr + token * R", check_ragged_gather,
    ),
    "slot out of range not shown": (
        "gather_values.py", 'tl.where(inside, weight, float("nan"))', "weight",
        check_slot_out_of_range,
    ),
    "lost tie": (
        "select/kernel.py", "keep = score >= limit_of(threshold, count - before, top_k)",
        "keep = score > limit_of(threshold, count - before, top_k)", check_flat_of_equal_scores,
    ),
    "threshold above the k-th best": (
        "select/threshold.py", ">= top_k", ">= top_k // 2", check_flat_of_distinct_scores,
    ),
    "threads of a row append to the same slots": (
        "select/layout.py", "before += tl.where", "before -= tl.where", check_product_with_ties,
    ),
    "warps that share rows append to the same slots": (
        "select/layout.py", "before += tl.cumsum(four, 1) - four", "before += four * 0",
        check_few_of_distinct_scores,
    ),
    "rows past the last token": (
        "combine/kernels.py", "mask &= token < num_tokens", "mask &= token >= 0",
        check_product_with_ties,
    ),
    "tf32": (
        "select/scoring.py", "tl.dot(query, keys, input_precision=PRECISION)",
        "tl.dot(query, keys)", check_precision_is_stated,
    ),
    "keys past the end": (
        "select/kernel.py", "& (key < end)", "& (key >= 0)", check_flat_of_distinct_scores,
    ),
    "candidate pairs off by one": (
        "combine/plan.py", "| (column + skip)", "| column", check_product_with_ties,
    ),
    "wrong stride of a slot": (
        "combine/kernels.py", "* num_subkeys +", "* (num_subkeys + 1) +", check_product_with_ties,
    ),
    "infinities of both signs": (
        "combine/kernels.py", 'tl.where(total != total, float("-inf"), total)', "total",
        check_infinities,
    ),
    "runs of one direction": (
        "combine/sorting.py", "(bit_of(AXIS, len(x.shape)) == ascending)",
        "(bit_of(AXIS, len(x.shape)) == 0)", check_product_with_ties,
    ),
    "the best merged in the same order": (
        "combine/sorting.py", "tl.flip(other, 1)", "other", check_product_with_ties,
    ),
    "wrong stride of a half": (
        "combine/kernels.py", "half_row // R * splits", "half_row // R",
        check_few_of_distinct_scores,
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
    if not torch.cuda.is_available():
        check(kernels)
