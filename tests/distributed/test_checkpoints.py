"""Sharded memories in checkpoints of torch.distributed.checkpoint: other ranks, other layouts."""

import pytest
import torch
from ranks import run_ranks
from sharded_checkpoints import CASES, Both, contents, load, zeroed
from torch import distributed

from pkm_triton.distributed import latest_checkpoint, new_checkpoint

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def run(tmp_path, ranks, call, **options):
    script = f"import sharded_checkpoints\nsharded_checkpoints.{call}"
    run_ranks(script, tmp_path, ranks, **options)


def assert_same(loaded, saved, place=""):
    """Nested data are the same to the bit."""
    if isinstance(saved, dict):
        # As it loads, torch adds an option to groups.
        assert saved.keys() | {"differentiable"} == loaded.keys() | {"differentiable"}, place
        for key in saved:
            assert_same(loaded[key], saved[key], f"{place}/{key}")
    elif isinstance(saved, list):
        for number, parts in enumerate(zip(loaded, saved, strict=True)):
            assert_same(*parts, f"{place}/{number}")
    elif isinstance(saved, torch.Tensor):
        assert loaded.dtype == saved.dtype, place
        assert torch.equal(loaded, saved), place
    else:
        assert loaded == saved, place


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_saved_by_four_loaded_by_two_and_by_one(tmp_path):
    """Neither K = 25 nor d_v = 7 divides by either; states as well, of both optimisers."""
    run(tmp_path, 4, "run_save(rank, ranks, folder)")
    run(tmp_path, 2, "run_load(rank, ranks, folder)")
    for name, (form, dtype, *_) in CASES.items():
        saved = torch.load(tmp_path / f"{name}.saved")
        assert_same(torch.load(tmp_path / f"{name}.loaded"), saved, name)
        model = zeroed(form, dtype)
        optimiser = Both(model)
        load(model, optimiser, tmp_path / name, no_dist=True)
        assert_same(contents(model, optimiser), saved, name)


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_table(tmp_path):
    run(tmp_path, 4, "run_save_large(rank, ranks, folder)")
    run(tmp_path, 2, "run_load_large(rank, ranks, folder)")


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_one(tmp_path):
    run(tmp_path, 2, "run_killed(rank, ranks, folder)", killed=[1])
    run(tmp_path, 2, "run_after_killed(rank, ranks, folder)")


def test_folders_without_a_process_group(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert new_checkpoint(tmp_path / "new" / "folder").name == "000001"
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        new_checkpoint(tmp_path / "file")
