"""Planted bugs: each must be caught by the check named beside it."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from mutation import is_caught, plant
from oracle import all_flat_scores, all_product_scores, assert_selects_exactly, gather
from tolerance import assert_close_to_oracle

from pkm_triton import kernels

from .misleading import NUM_KEYS, TOP_K, misleading_keys

# Infinite sub-keys times the zeros of absent rows.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def small_integers(*shape):
    return torch.randint(-4, 5, shape).float()


def on_chip(mutant, multiprocessors):
    """Have the kernels choose shapes for many queries, on a small chip, or for few, on a large."""
    launch = importlib.import_module(f"{mutant.__name__}.launch")
    launch.INTERPRETER = dataclasses.replace(launch.INTERPRETER, multiprocessors=multiprocessors)
    return mutant


@pytest.fixture(autouse=True)
def _restored_chip(monkeypatch):
    launch = importlib.import_module(f"{kernels.__name__}.launch")
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER)


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
    scores, slots = on_chip(mutant, 1 << 20).product_key_topk(query, subkeys, 12)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def check_few_of_a_long_stretch(mutant):
    # Of 128 stretches, each of three tiles, the first has the best keys, all over two tiles.
    keys = -torch.arange(1.0, 20_001)
    keys[:128] = keys[:128][torch.randperm(128)]
    query = torch.ones(1, 1, 1)
    scores, _ = on_chip(mutant, 1 << 20).flat_key_topk(query, keys.view(1, -1, 1), 9)
    assert torch.equal(scores[0, 0], torch.arange(-1.0, -10, -1))


def check_flat_of_distinct_scores(mutant):
    keys = torch.randperm(600).float().view(1, 600, 1)
    scores, _ = on_chip(mutant, 1).flat_key_topk(torch.ones(20, 1, 1), keys, 30)
    assert torch.equal(scores[0, 0], torch.arange(599.0, 569, -1))


def check_many_of_distinct_scores(mutant):
    keys = torch.randperm(300).float().view(1, 300, 1) + 300
    scores, slots = on_chip(mutant, 1).flat_key_topk(torch.ones(1, 1, 1), keys, 100)
    assert_selects_exactly(scores, slots, keys.view(1, 1, 300).double())


def check_many_of_equal_scores(mutant):
    keys = torch.randint(0, 40, (1, 300, 1)).float() + 300
    scores, slots = on_chip(mutant, 1).flat_key_topk(torch.ones(1, 1, 1), keys, 100)
    assert_selects_exactly(scores, slots, keys.view(1, 1, 300).double())


def check_flat_scores_far_apart(mutant):
    # Of few bits, so that a key is its score.
    keys = torch.logspace(-30, 30, 200).bfloat16().float()[torch.randperm(200)].view(1, 200, 1)
    scores, _ = on_chip(mutant, 1).flat_key_topk(torch.ones(1, 1, 1), keys, 32)
    assert torch.equal(scores[0, 0], keys.flatten().topk(32).values)


def check_negative_scores_near_each_other(mutant):
    # So near that half of their bits say nothing.
    keys = (-1 - 2.0**-20 * torch.randperm(600)).view(1, 600, 1)
    scores, _ = on_chip(mutant, 1).flat_key_topk(torch.ones(1, 1, 1), keys, 30)
    assert torch.equal(scores[0, 0], -1 - 2.0**-20 * torch.arange(30.0))


def check_keys_that_mislead(mutant):
    launch = importlib.import_module(f"{on_chip(mutant, 1).__name__}.launch")
    query, keys = torch.ones(1, 1, 1), torch.empty(1, NUM_KEYS, 1)
    for when in ("first", "raised"):
        keys[0, :, 0] = misleading_keys(launch.choose_lists(query, keys, TOP_K), when)
        scores, _ = mutant.flat_key_topk(query, keys, TOP_K)
        assert torch.equal(scores[0, 0], keys.flatten().topk(TOP_K).values)


def check_flat_of_equal_scores(mutant):
    keys = torch.randn(1, 300, 2)
    scores, slots = on_chip(mutant, 1).flat_key_topk(torch.zeros(1, 1, 2), keys, 5)
    assert_selects_exactly(scores, slots, torch.zeros(1, 1, 300).double())


def check_product_of_many(mutant):
    query, subkeys = distinct_scores()
    scores, slots = on_chip(mutant, 1).product_key_topk(query, subkeys, 100)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def check_more_equal_sums_than_a_list_holds(mutant):
    subkeys = torch.randn(1, 2, 300, 1)
    scores, slots = on_chip(mutant, 1).product_key_topk(torch.zeros(1, 1, 2), subkeys, 300)
    assert_selects_exactly(scores, slots, torch.zeros(1, 1, 300 * 300).double())


def check_infinities(mutant):
    subkeys = torch.tensor([torch.inf, 0, -torch.inf]).view(1, 1, 3, 1).expand(1, 2, 3, 1)
    for multiprocessors in (1, 1 << 20):
        on_chip(mutant, multiprocessors)
        scores, _ = mutant.product_key_topk(torch.ones(1, 1, 2), subkeys.contiguous(), 9)
        assert scores.flatten().tolist() == [torch.inf] * 3 + [0] + [-torch.inf] * 5


def check_float32_is_accurate(mutant):
    for width in (200, 300):
        # Of any scale.
        query = torch.randn(5, 1, width) * torch.logspace(-9, 9, 5).view(5, 1, 1)
        keys = torch.randn(1, 90, width) * torch.logspace(-9, 9, 90).view(1, 90, 1)
        scores, slots = on_chip(mutant, 1).flat_key_topk(query, keys, 20)
        exact = all_flat_scores(query, keys).gather(-1, slots.long())
        same = torch.einsum("thd,hkd->thk", query, keys).gather(-1, slots.long())
        # Relative to what is summed, for sums may nearly cancel.
        size = all_flat_scores(query.abs(), keys.abs()).gather(-1, slots.long())
        assert_close_to_oracle((scores / size).float(), exact / size, (same / size).float())


def check_infinite_elements(mutant):
    query = torch.tensor([1 / 3, 1.0]).view(1, 1, 2)
    keys = torch.tensor([[torch.inf, 1 / 3], [1.0, 2.0]]).view(1, 2, 2)
    scores, _ = on_chip(mutant, 1).flat_key_topk(query, keys, 2)
    assert scores[0, 0, 0] == torch.inf
    assert scores[0, 0, 1] == pytest.approx(7 / 3)


def check_precision_is_stated(mutant):
    # Only a GPU multiplies float32 in tf32 by default; the interpreter would not show it.
    for file in ("scoring.py", "split_topk.py"):
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
        "appending.py", "~(scores < bound[None, :])", "~(scores <= bound[None, :])",
        check_flat_of_equal_scores,
    ),
    "tie not counted": (
        "assembly.py", "tl.where(x < bound, 0.0, 1.0)", "tl.where(x <= bound, 0.0, 1.0)",
        check_flat_of_equal_scores,
    ),
    "bound above the k-th best": (
        "bounds.py", "ROWS) >= least", "ROWS) >= least // 2", check_flat_of_distinct_scores,
    ),
    "maxima rounded up": (
        "bounds.py", "(bits >> 31) & 0xFFFF", "(bits >> 31) & 0",
        check_negative_scores_near_each_other,
    ),
    "guessed bound not checked": (
        "selection.py", "tl.max(short.to(tl.int32)) > 0", "tl.max(short.to(tl.int32)) > 1",
        check_keys_that_mislead,
    ),
    "raised bound not checked": (
        "selection.py", "(count < TOP_K) | (last < bound)", "count < TOP_K",
        check_keys_that_mislead,
    ),
    "bound guessed again": (
        "selection.py", "turn > 0,", "turn > 1,", check_keys_that_mislead,
    ),
    "bound raised too far again": (
        "selection.py", "tl.where(sure, TOP_K, likely_enough(", "tl.where(sure, 9, likely_enough(",
        check_keys_that_mislead,
    ),
    "a tile left out": (
        "selection.py", "place - (past - first_key))", "first_key)",
        check_keys_that_mislead,
    ),
    "threads of a row append to the same slots": (
        "thread_form.py", "before += tl.where", "before -= tl.where", check_product_with_ties,
    ),
    "rows past the last token": (
        "pairs.py", "mask = (row < num_rows) & (rank < TOP_K)", "mask = rank + row * 0 < TOP_K",
        check_product_with_ties,
    ),
    "tf32": (
        "scoring.py", "tl.dot(query, tile, input_precision=PRECISION)", "tl.dot(query, tile)",
        check_precision_is_stated,
    ),
    "second parts of float32 lost": (
        "float32_products.py", "(x - first.to(tl.float32))", "(x - x)", check_float32_is_accurate,
    ),
    "a product of later columns lost": (
        "float32_products.py", "total = plus(total, finite(tl.dot(second, other_first)))",
        "total = total", check_float32_is_accurate,
    ),
    "parts of queries among the lists": (
        "selection.py", "spare_ptr += (2**LOG_LIST + 1) * ROWS", "spare_ptr += 0",
        check_float32_is_accurate,
    ),
    "units and their reciprocals": (
        "float32_products.py", "(254 - exponent)", "(255 - exponent)", check_float32_is_accurate,
    ),
    "second parts of infinite elements": (
        "float32_products.py", 'tl.where(tl.abs(x) < float("inf"), x, 0.0)', "x",
        check_infinite_elements,
    ),
    "warps that share rows append to the same slots": (
        "thread_form.py", "odd[:, None, None, None] == 1", "odd[:, None, None, None] == 2",
        check_product_of_many,
    ),
    "sums that overflow their list": (
        "pairs.py", "(2**LOG_SUMS - longest)", "(8 * 2**LOG_SUMS - longest)",
        check_more_equal_sums_than_a_list_holds,
    ),
    "candidate bound off by one": (
        "pairs.py", "tl.minimum(TOP_K // rank", "tl.minimum((TOP_K - 1) // rank",
        check_product_of_distinct_scores,
    ),
    "wrong stride of a slot": (
        "pairs.py", "* num_subkeys +", "* (num_subkeys + 1) +", check_product_with_ties,
    ),
    "infinities of both signs": (
        "pairs.py", "tl.where(a + b != a + b,", "tl.where(a != a,", check_infinities,
    ),
    "infinities of both signs, few queries": (
        "product_key_topk.py", 'tl.where(total != total, float("-inf"), total)', "total",
        check_infinities,
    ),
    "narrow keys that overflow": (
        "entries.py", "< 2 ** (32 - LOG_RANK)", "< 2**32 - 1", check_flat_scores_far_apart,
    ),
    "fewer above the bound than are wanted": (
        "lists.py", "exact & (reach >= tl.minimum(length, TOP_K))", "exact",
        check_keys_that_mislead,
    ),
    "neighbours that share a rank": (
        "entries.py", "exact & (same < bound)", "exact", check_many_of_equal_scores,
    ),
    "which of two neighbours": (
        "lists.py", "tl.where(wrong, other, best)", "best", check_many_of_distinct_scores,
    ),
    "equal scores that change places once": (
        "sorting.py", "two < one,", "two <= one,", check_many_of_equal_scores,
    ),
    "runs of one direction": (
        "sorting.py", "(run % 2 == 1) & (RUN < EACH)", "(run < 0) & (RUN < EACH)",
        check_product_with_ties,
    ),
    "keys past the end": (
        "split_topk.py", "tl.where(key < end, pair, NOTHING)", "pair", check_few_of_a_long_stretch,
    ),
    "stretches merged in the same order": (
        "split_topk.py", "tl.flip(second, 1)", "second", check_few_of_a_long_stretch,
    ),
    "wrong stride of a half": (
        "product_key_topk.py", "half * splits * HALF_TOP", "half * HALF_TOP",
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
