"""Memories spread over ranks on gloo: as one process with all ranks' tokens."""

import pytest
import torch
from ranks import run_ranks
from sharded_training import DTYPES, FORMS, layouts, make_model, train_alone
from torch import distributed

from pkm_triton.optim import SparseAdam

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
# Of sums in another order, and of half precision also rounded in parts.
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}
KINDS = {False: "DTensor", True: "ShardedGradient", "factored": "ShardedGradient"}


def run(tmp_path, ranks, call):
    run_ranks(f"import sharded_training\nsharded_training.{call}", tmp_path, ranks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "dtypes"), [(2, DTYPES), (4, [torch.float32])], ids=["two", "four"]
)
def test_ranks_are_as_one(tmp_path, ranks, dtypes):
    """Outputs, norms and parameters, with uneven tokens, none at times, and passes that add up."""
    run(tmp_path, ranks, f"run_training(rank, ranks, folder, {dtypes})")
    for form in FORMS:
        for dtype in dtypes:
            model = make_model(form, dtype)
            optimiser = SparseAdam(model.parameters(), lr=0.01, rounding="master")
            norms, outputs = train_alone(model, ranks, 3, optimiser, dtype)
            close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
            for layout in layouts(ranks):
                for rank in range(ranks):
                    where = f"{layout}, {form}, {dtype}, rank {rank}"
                    record = torch.load(tmp_path / f"{layout}-{form}-{dtype}-{rank}.pt")
                    their_norms, their_outputs, parameters, kind = record
                    if layout != "replicate":
                        assert kind == KINDS[form], where
                    torch.testing.assert_close(their_norms, norms, **close, check_dtype=False)
                    for ours, theirs in zip(outputs, their_outputs, strict=True):
                        torch.testing.assert_close(theirs, ours[rank], **close, msg=where)
                    for name, parameter in model.named_parameters():
                        theirs = parameters[name]
                        torch.testing.assert_close(theirs, parameter.detach(), **close, msg=where)


def test_what_is_wrong_is_said_on_every_rank(tmp_path):
    run(tmp_path, 2, "run_refused(rank, folder)")
    ranks = [torch.load(tmp_path / f"refused-{rank}.pt") for rank in range(2)]
    for name, expected in {
        "layout": "layout is 'diagonal', but must be one of 'columns', 'rows', 'replicate'",
        "dimensions": "but mesh has 1 dimensions",
        "none": "model has no memory",
        "too many": "has 1 columns, which over 2 ranks leave rank 1 none",
        "again": "is sharded already",
        "experts": "ProductKeyExperts",
        "mesh": "mesh must be a DeviceMesh, not str",
        "differ": "ranks differ",
        "one rank": "layout is 'diagonal'",
        "reads": "ranks differ in reads a token",
        "recording": "ranks differ in whether gradients are recorded",
        "tuned": "values are sharded",
        "sharing": "share values before shard_memory",
    }.items():
        for said in ranks:
            assert expected in said[name], (name, said[name])


def test_no_process_group_is_said():
    import pkm_triton as pkm

    with pytest.raises(RuntimeError, match="no process group"):
        pkm.distributed.shard_memory(make_model(), "mesh")


def test_compiled_meta_and_wrapped(tmp_path):
    """One graph; values drawn alike in every layout; DistributedDataParallel and FSDP2 around."""
    run(tmp_path, 2, "run_more(rank, ranks, folder)")


@pytest.mark.slow
def test_a_rank_needs_no_more_than_its_shard_and_reads(tmp_path):
    """By the sweep's meter: of working memory T_all · (R · 8 + 2 · d_v · itemsize) at most."""
    run_ranks("import memory_ranks\nmemory_ranks.run_memory(rank, ranks)", tmp_path, 4)
