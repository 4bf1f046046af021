"""`save_with_memory` and `load_with_memory` of models that lie over ranks."""

import re

import pytest
import torch
from ranks import run_ranks
from sharded_checkpoints import zeroed
from sharded_files import CASES
from sharded_training import make_model
from torch import distributed

import pkm_triton as pkm

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def run(tmp_path, ranks, name, **options):
    script = f"import sharded_files\nsharded_files.{name}(rank, ranks, folder)"
    run_ranks(script, tmp_path, ranks, **options)


@pytest.mark.slow
def test_ranks_and_one_process_read_what_the_other_wrote(tmp_path):
    """Neither K = 25 nor d_v = 7 divides by ranks; the rest of the model is under FSDP2."""
    run(tmp_path, 4, "run_save")
    for layout, dtype in CASES.items():
        expected = torch.load(tmp_path / f"{layout}.expected")
        model = pkm.load_with_memory(zeroed(False, dtype), tmp_path / f"{layout}.pt")
        assert model[1].values is model[3].values
        loaded = model.state_dict()
        for key in expected:
            assert torch.equal(loaded[key], expected[key]), (layout, key)
        pkm.save_with_memory(model, tmp_path / f"{layout}.whole")
    model = pkm.load_with_memory(zeroed(False, torch.float32), tmp_path / "copies.pt")
    assert torch.equal(model[1].values, make_model()[1].values)
    run(tmp_path, 2, "run_load")


@pytest.mark.slow
def test_no_rank_ever_holds_more_than_a_block(tmp_path):
    run(tmp_path, 2, "run_large")


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_ends_all_and_leaves_the_old_file(tmp_path):
    run(tmp_path, 2, "run_refused", killed=[0])
    assert not list(tmp_path.glob("mine*"))
    ranks = [torch.load(tmp_path / f"said-{rank}.pt") for rank in range(2)]
    for name, expected in {
        "full": "OSError: .*No space left on device",
        "differ": "ValueError: ranks differ in path: .*mine-1.pt",
        "group": "ValueError: .*pass a group with all ranks of its mesh",
        "name": "ValueError: .*m.safetensors",
        "gone": "(FileNotFoundError|OSError): .*mine-0.pt",
        "other": "ValueError: .*but the saved one is",
        "damaged": "ValueError: .*differs from its checksum",
    }.items():
        for said in ranks:
            assert re.search(expected, said[name]), (name, said[name])
