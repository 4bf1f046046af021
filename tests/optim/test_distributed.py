"""Two ranks under DistributedDataParallel on gloo: as one rank with both halves of the batch."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed
from two_ranks import make_model, run_rank, train


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_as_one(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    expected = train(make_model(False), [0, 1])
    for sparse_grad in (False, True):
        ranks = [torch.load(tmp_path / f"{sparse_grad}-{rank}.pt") for rank in range(2)]
        for name in expected:
            assert torch.equal(ranks[0][name], ranks[1][name]), name
    for name, parameter in train(make_model(False), [0, 1]).items():
        trained = torch.load(tmp_path / "False-0.pt")[name]
        torch.testing.assert_close(trained, parameter, msg=name)
    for name, parameter in train(make_model(True), [0, 1]).items():
        trained = torch.load(tmp_path / "True-0.pt")[name]
        torch.testing.assert_close(trained, parameter, msg=name)
    for rank in range(2):
        refused = torch.load(tmp_path / f"factored-{rank}.pt")
        assert "sparse_grad='factored'" in refused
