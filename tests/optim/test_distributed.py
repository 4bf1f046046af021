"""Two ranks under DistributedDataParallel on gloo: as one rank with both halves of the batch."""

import pytest
import torch
from parallel_training import make_model, train
from ranks import run_two_ranks
from torch import distributed


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_as_one(tmp_path):
    run_two_ranks("from parallel_training import run_rank\nrun_rank(rank, folder)", tmp_path)
    for sparse_grad in (False, True):
        ranks = [torch.load(tmp_path / f"{sparse_grad}-{rank}.pt") for rank in range(2)]
        for name, parameter in train(make_model(sparse_grad), [0, 1]).items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], parameter, msg=name)
    for rank in range(2):
        refused = torch.load(tmp_path / f"factored-{rank}.pt")
        assert "sparse_grad='factored'" in refused
