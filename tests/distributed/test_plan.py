"""How large a memory fits: by hand, as measured on ranks, and as the documentation says."""

import functools

import pytest
import torch
from ranks import run_ranks
from torch import distributed

import pkm_triton as pkm
from pkm_triton.optim import SparseAdam

plan = pkm.distributed.plan
MASTER = functools.partial(SparseAdam, rounding="master")


def by_layout(planned):
    return {each.layout: each for each in planned.layouts}


def test_bytes_of_a_parameter():
    """14 with a float32 master and moments, 10 rounded stochastically, 16 of Adam in float32."""
    sizes = {"world": 8, "memory_per_rank": 80e9, "tokens": 0}
    for optimizer, dtype, sparse_grad, expected in (
        (MASTER, torch.bfloat16, True, 14),
        (SparseAdam, torch.bfloat16, "factored", 10),
        (torch.optim.Adam, torch.float32, False, 16),
        (torch.optim.SGD, torch.float32, True, 4),
        (None, torch.float16, True, 2),
    ):
        form = {"dtype": dtype, "sparse_grad": sparse_grad}
        planned = plan(1 << 20, 1024, optimizer, **sizes, **form)
        for layout, each in by_layout(planned).items():
            ranks = 1 if layout == "replicate" else 8
            working = each.working_bytes if layout == "replicate" else 0
            assert each.total_bytes == expected * (1 << 30) // ranks + working, layout


def test_states_of_rows_are_counted_by_row():
    class ByRow(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["mean"] = parameter.new_zeros(parameter.shape[0])

    planned = plan(1000, 64, ByRow, 2, 1e9, dtype=torch.float32)
    layouts = by_layout(planned)
    assert layouts["columns"].state_bytes == 4 * 1000
    assert layouts["rows"].state_bytes == 4 * 500


def test_best_is_what_fits_and_sends_least():
    small = plan(10_000, 1024, SparseAdam, 8, 80e9)
    assert small.fits
    assert small.best is min(small.layouts, key=lambda each: each.sent_bytes)
    assert small.best.layout == "columns"
    # The table whole, where nothing is sent without training.
    assert plan(10_000, 1024, None, 8, 80e9).best.layout == "replicate"
    # 1024 / 64 columns of bfloat16 are 32 bytes: rows over some ranks leave whole lines.
    wide = plan(1 << 24, 1024, SparseAdam, 64, 80e9)
    assert wide.best.layout == ("rows", "columns")
    assert wide.best.ranks == (4, 16)
    assert set(by_layout(wide)) == {"replicate", "rows", ("rows", "columns")}
    # Rows of no more than a line are not cut, and no rank is left without a row.
    narrow = by_layout(plan(60, 32, SparseAdam, 64, 80e9))
    assert set(narrow) == {"replicate", "rows"}
    assert not narrow["rows"].fits
    huge = plan(1 << 30, 1024, SparseAdam, 8, 80e9)
    assert not huge.fits
    assert huge.best is None
    assert "no layout fits" in str(huge)


@pytest.mark.parametrize("world", [1, 8])
def test_the_largest_fits_and_one_more_does_not(world):
    sizes = 128, MASTER, world, 1e9
    largest = plan(1, *sizes).max_slots
    assert plan(largest, *sizes).fits
    assert not plan(largest + 1, *sizes).fits
    assert f"At most {largest:,} slots" in str(plan(1, *sizes))


def test_sent_is_that_of_traffic():
    layer = pkm.ProductKeyMemory(
        256, num_subkeys=32, heads=2, top_k=4, query_dim=8, device="meta", dtype=torch.bfloat16,
        sparse_grad=True,
    )  # fmt: skip
    sizes = {"tokens": 100, "reads": 8, "sparse_grad": True}
    for each in plan(layer.num_slots, 256, SparseAdam, 4, 80e9, **sizes).layouts:
        traffic = pkm.distributed.traffic(layer, 100, each.ranks, each.layout, equal_tokens=True)
        assert each.sent_bytes == traffic.sent(0), each.layout


def test_what_is_wrong_is_said():
    for wrong, expected in (
        ((0, 8, None, 2, 1e9), "num_slots is 0"),
        ((2**31, 8, None, 2, 1e9), "at most 2147483647"),
        ((8, 0, None, 2, 1e9), "value_dim is 0"),
        ((8, 8, None, 0, 1e9), "world is 0"),
        ((8, 8, None, 2, 0), "memory_per_rank is 0"),
        ((8, 8, torch.optim.Adam, 2, 1e9), "does not step .* sparse_grad='factored'"),
    ):
        with pytest.raises(ValueError, match=expected):
            plan(*wrong)
    with pytest.raises(TypeError, match="optimizer must make an optimiser"):
        plan(8, 8, "adam", 2, 1e9)
    with pytest.raises(TypeError, match="memory_per_rank must be a number, not '60GB'"):
        plan(8, 8, None, 2, "60GB")
    with pytest.raises(ValueError, match="dtype is"):
        plan(8, 8, None, 2, 1e9, dtype=torch.int8)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_a_rank_needs_what_is_planned(tmp_path):
    """And no less than half of it: the meter of the sweep over a step on four ranks."""
    run_ranks("import memory_ranks\nmemory_ranks.run_plan(rank, ranks)", tmp_path, 4)
