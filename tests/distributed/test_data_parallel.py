"""Two ranks under DistributedDataParallel on gloo: as one rank with both halves of the batch."""

import pytest
import torch
from parallel_training import FORMS, make_model, train
from ranks import run_two_ranks
from tolerance import assert_close_to_oracle
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def run(tmp_path, *names):
    calls = "\n".join(f"parallel_training.{name}(rank, folder)" for name in names)
    run_two_ranks(f"import parallel_training\n{calls}", tmp_path)


def trained_alone(form, shared=False):
    """Parameters that one process gets of both halves: the oracle's, and in float32."""
    oracle = train(make_model(form, shared).double(), [0, 1], dtype=torch.float64)
    same = train(make_model(form, shared), [0, 1])
    return {name: (oracle[name], same[name]) for name in oracle}


@pytest.mark.slow
def test_two_ranks_are_as_one(tmp_path):
    run(tmp_path, "run_rank")
    for form in FORMS:
        for shared in (False, True, "alone"):
            ranks = [torch.load(tmp_path / f"{form}-{shared}-{rank}.pt") for rank in range(2)]
            for name, alone in trained_alone(form, shared is True).items():
                assert torch.equal(ranks[0][name], ranks[1][name]), f"{name}, {form}, {shared}"
                assert_close_to_oracle(ranks[0][name], *alone)


@pytest.mark.slow
def test_sharded_ranks_are_as_one(tmp_path):
    """One optimiser and one norm of shards and of gradients of every other kind."""
    run(tmp_path, "run_sharded")
    for form in FORMS:
        ranks = [torch.load(tmp_path / f"{form}-torch.float32-{rank}.pt") for rank in range(2)]
        for name, alone in trained_alone(form).items():
            assert torch.equal(ranks[0][name], ranks[1][name]), f"{name}, {form}"
            assert_close_to_oracle(ranks[0][name], *alone)
        start = dict(make_model(form).bfloat16().named_parameters())
        half = torch.load(tmp_path / f"{form}-torch.bfloat16-0.pt")
        for name, parameter in half.items():
            assert parameter.isfinite().all(), name
            assert not torch.equal(parameter, start[name]), name


def test_ranks_that_differ(tmp_path):
    """One reads nothing; a memory is the whole model; and what is not put right is said."""
    run(tmp_path, "run_unequal", "run_refused")
    ranks = [torch.load(tmp_path / f"unequal-{rank}.pt") for rank in range(2)]
    alone = make_model(False)
    alone(torch.ones(5, 8)).square().sum().backward()
    for form in (True, "factored"):
        torch.testing.assert_close(ranks[0][form], alone[1].values.grad / 2)
        for name in (form, f"{form} root", f"{form} experts"):
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            assert ranks[0][name].count_nonzero() > 0
    left_in, nothing = torch.load(tmp_path / "refused-0.pt")
    assert "the values of memory '1' have sparse_grad=True" in left_in
    assert "ignore_sparse_values" in left_in
    assert "call average_gradients" in nothing
