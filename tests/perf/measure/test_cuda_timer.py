"""What is done around a pass on a GPU, in which order; recorded, for here is none."""

from types import SimpleNamespace

import pytest
import torch

from pkm_triton.perf.measure import timing
from pkm_triton.perf.measure.workload import Pass


@pytest.fixture
def done(monkeypatch):
    found = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            found.append("record")

        def synchronize(self):
            found.append("wait for the event")

        def elapsed_time(self, end):
            return 2.5

    cache = SimpleNamespace(zero_=lambda: found.append("clear L2"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("synchronize"))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=2**28)
    )
    empty = torch.empty
    sizes = []

    def on_gpu(*args, **kwargs):
        if kwargs.get("device") != "cuda":
            return empty(*args, **kwargs)
        sizes.append(args[0])
        return cache

    monkeypatch.setattr(torch, "empty", on_gpu)
    yield found
    assert set(sizes) == {2**29}


@pytest.mark.parametrize("queued", [False, True])
def test_what_a_user_calls_finds_an_idle_gpu_and_a_graph_a_busy_one(queued, done):
    run = Pass(lambda: done.append("run") or torch.ones(1), [], backward=False, queued=queued)
    sample = timing._CudaTimer()(run)
    waited = [] if queued else ["synchronize"]
    assert done == ["clear L2", *waited, "record", "run", "record", "wait for the event"]
    assert sample.wall == pytest.approx(2.5e-3)


def test_a_gpu_needs_one_core(done, monkeypatch):
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(timing._Others, "cores", lambda self: 6.5)
    run = Pass(lambda: torch.ones(1), [], backward=False)
    (found,) = timing.time_passes([run], seconds=0.01, device="cuda")
    assert found.remark == ""
    assert found.median_ms == pytest.approx(2.5)
    monkeypatch.setattr(timing._Others, "cores", lambda self: 7.5)
    (found,) = timing.time_passes([run], seconds=0.01, device="cuda")
    assert found.remark == "busy: other processes took 7.5 of 8 cores"
