"""Where the table of pairs of ranks is made and kept, as of a GPU that is not there."""

import threading
from contextlib import contextmanager

import pytest
import torch

from pkm_triton.kernels.combine import plan

GPU = torch.device("cuda", 1)


@pytest.fixture
def done(monkeypatch):
    """What is done on the GPU, in order, and by which thread."""
    found = []
    make = plan._make_rank_pairs

    @contextmanager
    def current(device):
        found.append(f"{device} is current")
        yield

    class Event:
        def record(self):
            found.append("recorded")

        def synchronize(self):
            found.append("waited for")

    def record(top_k, num_subkeys, device):
        found.append("made here" if threading.current_thread() is caller else "made elsewhere")
        return make(top_k, num_subkeys, torch.device("cpu"))

    caller = threading.current_thread()
    monkeypatch.setattr(plan, "_kept", {})
    monkeypatch.setattr(plan, "_make_rank_pairs", record)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_they_are_there_for_every_stream_and_of_no_graphs_memory(done):
    pairs = plan.rank_pairs(8, 16, GPU)
    assert done == ["cuda:1 is current", "made elsewhere", "recorded", "waited for"]
    assert plan.rank_pairs(8, 16, GPU) is pairs
    assert plan.rank_pairs(8, 16, torch.device("cuda", 0)) is not pairs
    assert done[4:] == ["cuda:0 is current", "made elsewhere", "recorded", "waited for"]


def test_a_graph_makes_its_own_unless_they_are_kept(done, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first = plan.rank_pairs(8, 16, GPU)
    assert plan.rank_pairs(8, 16, GPU) is not first
    assert done == ["made here", "made here"]
    assert not plan._kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = plan.rank_pairs(8, 16, GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert plan.rank_pairs(8, 16, GPU) is kept
    assert torch.equal(kept, first)
