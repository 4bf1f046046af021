"""Memories spread over ranks on gloo: as one process with all ranks' tokens."""

import pytest
import torch
from ranks import run_ranks
from sharded_training import DTYPES, FORMS, layouts, make_model, train_alone
from tolerance import assert_close_to_oracle
from torch import distributed

from pkm_triton.optim import SparseAdam

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
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
    _assert_as_one(tmp_path, ranks, dtypes)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not distributed.is_nccl_available(),
    reason="needs two GPUs and NCCL",
)
def test_ranks_of_nccl_are_as_one(tmp_path):
    dtypes = [torch.float32, torch.bfloat16]
    call = f"sharded_training.run_training(rank, ranks, folder, {dtypes})"
    run_ranks(f"import sharded_training\n{call}", tmp_path, 2, backend="nccl")
    _assert_as_one(tmp_path, 2, dtypes)


def _assert_as_one(tmp_path, ranks, dtypes):
    for form in FORMS:
        for dtype in dtypes:
            oracle = trained(make_model(form, dtype).double(), ranks, dtype)
            same = trained(make_model(form, dtype), ranks, dtype)
            for layout in layouts(ranks):
                for rank in range(ranks):
                    where = f"{layout}, {form}, {dtype}, rank {rank}"
                    record = torch.load(tmp_path / f"{layout}-{form}-{dtype}-{rank}.pt")
                    norms, outputs, parameters, kind = record
                    if layout != "replicate":
                        assert kind == KINDS[form], where
                    # Of half precision a norm adds up what each rank has rounded; its steps tell.
                    found = parameters | (
                        {"norms": torch.stack(norms)} if dtype != torch.bfloat16 else {}
                    )
                    found |= {f"output {i}": output for i, output in enumerate(outputs)}
                    for name, theirs in found.items():
                        pick = rank if name.startswith("output") else 0
                        alike = same[name][pick], oracle[name][pick]
                        assert_as_one(theirs, *alike, dtype, f"{name}, {where}")


def assert_as_one(theirs, alone, oracle, dtype, where):
    """By the rule; in float64, which is the oracle's own, up to the order of sums."""
    if dtype == torch.float64:
        torch.testing.assert_close(theirs, alone, rtol=1e-14, atol=1e-14, msg=where)
        return
    try:
        assert_close_to_oracle(theirs, oracle.double(), alone)
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error


def trained(model, ranks, dtype):
    """What one process gets of all ranks' tokens; of an output, a part for each rank."""
    optimiser = SparseAdam(model.parameters(), lr=0.01, rounding="master")
    norms, outputs = train_alone(model, ranks, 3, optimiser, dtype)
    found = {name: [parameter.detach()] for name, parameter in model.named_parameters()}
    found |= {f"output {i}": parts for i, parts in enumerate(outputs)}
    return found | {"norms": [torch.stack(norms)]}


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
        "part of a pool": "shares its values with a memory outside of model",
        "spread already": "shares its values with a memory outside of model",
        "group": "group is 'x', but must be None or a ProcessGroup",
        "group of a file": "group is 'x', but must be None or a ProcessGroup",
        "group of usage": "group is 'x', but must be None or a ProcessGroup",
        "differ": "ranks differ in the table, shape",
        "one rank": "layout is 'diagonal'",
        "reads": "ranks differ in reads a token",
        "recording": "ranks differ in whether gradients are recorded",
        "mesh of one": "mesh must be a DeviceMesh, not str",
        "shapes": "ranks differ in layout: rank 1 has",
        "flag": "equal_tokens must be True or False",
        "forms": "ranks differ in the table, shape, dtype, sparse_grad",
        "three": "mesh has 3 dimensions",
        "sizes": "ranks differ in the dtype of weights",
        "steps sparse": "SparseAdam does not take",
        "steps Adam": "optimizer torch.optim.adam.Adam does not take",
        "steps foreach": "has foreach=True in group 0",
        "steps plain": "nothing",
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
