"""Counts of reads and of batches, and the slots that a task reads more than others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_two_ranks

import pkm_triton as pkm


def batches(seed, number, num_slots=12):
    generator = torch.Generator().manual_seed(seed)
    size = (3, 2, 5)
    return [torch.randint(0, num_slots, size, generator=generator).int() for _ in range(number)]


def counted(some, num_slots=12):
    counts = pkm.SlotCounts(num_slots)
    for slots in some:
        counts.update(slots)
    return counts


@given(seed=st.integers(0, 99), number=st.integers(0, 6), num_slots=st.integers(1, 40))
def test_counts(seed, number, num_slots):
    some = batches(seed, number, num_slots)
    counts = counted(some, num_slots)
    reads = [slots.flatten().tolist() for slots in some]
    expected = [sum(each.count(slot) for each in reads) for slot in range(num_slots)]
    assert counts.counts.tolist() == expected
    frequency = [sum(slot in each for each in reads) for slot in range(num_slots)]
    assert counts.batches_with.tolist() == frequency
    assert counts.num_batches == number


def test_merged_saved_and_gone_on():
    whole, half = counted(batches(0, 5) + batches(1, 4)), counted(batches(0, 5))
    half.merge(counted(batches(1, 4)))
    loaded = pkm.SlotCounts(12)
    loaded.load_state_dict(counted(batches(0, 5)).state_dict())
    for slots in batches(1, 4):
        loaded.update(slots)
    for other in (half, loaded):
        assert torch.equal(other.counts, whole.counts)
        assert torch.equal(other.batches_with, whole.batches_with)
        assert other.num_batches == whole.num_batches


def test_begun_in_inference_mode(device):
    first, second = (slots.to(device) for slots in batches(0, 2))
    with torch.inference_mode():
        counts = pkm.SlotCounts(12)
        counts.update(first)
    counts.update(second)
    assert torch.equal(counts.counts, torch.stack([first, second]).flatten().bincount(minlength=12))


def test_ranked_by_the_formula():
    """c(i) / sum of c · log((B + 1) / (df(i) + 1)), in numpy."""
    task, background = counted(batches(2, 3, 9)), counted(batches(3, 7))
    c, df = task.counts.numpy(), background.batches_with.numpy()
    scores = c / c.sum() * np.log((7 + 1) / (df + 1))
    expected = [int(i) for i in np.argsort(-scores, kind="stable") if c[i] > 0]
    assert pkm.rank_slots(task, background, 5).tolist() == expected[:5]
    assert pkm.rank_slots(task, background, 12).tolist() == expected
    assert set(pkm.rank_slots(task, background, 12).tolist()) == set(np.flatnonzero(c))


def test_what_the_background_reads_always_comes_last():
    task, background = pkm.SlotCounts(4), pkm.SlotCounts(4)
    task.update(torch.tensor([0, 0, 0, 1, 2]))
    for _ in range(9):
        background.update(torch.tensor([0, 3]))
    background.update(torch.tensor([1, 0]))
    assert pkm.rank_slots(task, background, 3).tolist() == [2, 1, 0]
    assert math.isclose(float(background.batches_with[0]), 10)


def test_counts_of_a_layer():
    layer = pkm.ProductKeyMemory(8, num_subkeys=4, heads=2, top_k=3, query_dim=4)
    counts = pkm.SlotCounts(layer.num_slots)
    counts.update(layer.lookup(torch.randn(5, 8))[1])
    assert int(counts.counts.sum()) == 5 * 2 * 3


RANK = """
import pkm_triton as pkm
counts = pkm.SlotCounts(12)
for slots in torch.load(f"{folder}/{rank}.pt"):
    counts.update(slots)
groups = [dist.new_group([each]) for each in range(2)]
before = counts.state_dict()
counts.all_reduce(groups[rank])
assert all(torch.equal(tensor, before[name]) for name, tensor in counts.state_dict().items())
counts.all_reduce()
counts.update(torch.tensor([3, 3], dtype=torch.int32))
torch.save(counts.state_dict(), f"{folder}/all-{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_all_reduce(tmp_path):
    parts = batches(0, 3), batches(1, 2)  # of ranks with other numbers of batches
    for rank, part in enumerate(parts):
        torch.save(part, tmp_path / f"{rank}.pt")
    run_two_ranks(RANK, tmp_path)
    expected = counted([*parts[0], *parts[1], torch.tensor([3, 3], dtype=torch.int32)])
    assert expected.num_batches == 6
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / f"all-{rank}.pt").items():
            assert torch.equal(tensor, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.update(torch.tensor([12])), ValueError, r"slots must lie in \[0, 12\)"),
        (lambda c: c.update(torch.rand(2)), TypeError, r"slots has dtype torch\.float32"),
        (lambda c: c.update(torch.zeros(2, device="meta").int()), ValueError, "slots on meta"),
        (lambda c: c.merge(pkm.SlotCounts(3)), ValueError, "other has 3 slots, but must have 12"),
        (lambda c: c.merge(3), TypeError, "other must be a SlotCounts"),
        (lambda c: c.load_state_dict({"counts": c.counts}), ValueError, "no batches_with, num_b"),
        (lambda c: c.load_state_dict(3), TypeError, "state must be a state dict, not int"),
        (lambda c: c.load_state_dict(pkm.SlotCounts(3).state_dict()), ValueError, r"shape \[3\]"),
        (
            lambda c: c.load_state_dict(c.state_dict() | {"batches_with": [0] * 12}),
            TypeError,
            r"state\['batches_with'\] must be a tensor \[K\], not list",
        ),
        (lambda c: pkm.rank_slots(c, c, 0), ValueError, "top is 0"),
        (lambda c: pkm.rank_slots(c, c, 13), ValueError, "top is 13, but there are only 12"),
        (lambda c: pkm.rank_slots(c, pkm.SlotCounts(3), 1), ValueError, "background 3"),
        (lambda c: pkm.rank_slots(c, None, 1), TypeError, "background must be a SlotCounts"),
    ],
)
def test_wrong_calls(call, error, message):
    counts = counted(batches(0, 2))
    before = counts.state_dict()
    with pytest.raises(error, match=message):
        call(counts)
    for name, tensor in counts.state_dict().items():
        assert torch.equal(tensor, before[name]), name
