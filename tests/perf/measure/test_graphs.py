"""What is done to capture a graph, recorded: here is no GPU."""

from contextlib import contextmanager

import pytest
import torch

from pkm_triton.perf.measure.graphs import captured
from pkm_triton.perf.measure.workload import Pass


class Stream:
    def __init__(self, name="side"):
        self.name = name

    def wait_stream(self, other):
        Stream.done.append(f"{self.name} waits for {other.name}")


class Graph:
    def replay(self):
        Stream.done.append("replayed")


@pytest.fixture
def done(monkeypatch):
    Stream.done = found = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: found.append(f"back to {s.name}"))

    @contextmanager
    def stream(which):
        found.append(f"on {which.name}")
        yield

    @contextmanager
    def graph(_):
        found.append("capture")
        yield
        found.append("captured")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def test_a_call_is_warmed_up_and_captured(done):
    graph, out = captured(lambda: done.append("run") or 7)
    assert (type(graph), out) == (Graph, 7)
    assert done == [
        "side waits for current", "on side", "run", "run", "run", "current waits for side",
        "capture", "run", "captured",
    ]  # fmt: skip


def test_after_a_failure_the_stream_is_the_one_before(done):
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        captured(run)
    assert done[-1] == "back to current"


def test_a_pass_is_replayed_on_a_busy_gpu(done):
    given = Pass(lambda x: x + 1, [torch.ones(2)], backward=False)
    assert not given.queued
    replay = given.captured()
    assert replay.queued
    assert "replayed" not in done
    replay.run()
    assert done[-1] == "replayed"
