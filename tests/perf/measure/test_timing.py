import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pkm_triton.perf.measure import roofline, timing
from pkm_triton.perf.measure.memory import measure_peak
from pkm_triton.perf.measure.timing import measure_group, time_passes
from pkm_triton.perf.measure.workload import Workload
from pkm_triton.perf.records.points import Point

SIZES = {"num_subkeys": 8, "top_k": 4, "heads": 2, "dim": 16, "value_dim": 16, "query_dim": 8}


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch, others=0.0):
        self.wall = self.cpu = 0.0
        self.ran = []
        fake = SimpleNamespace(perf_counter=lambda: self.wall, process_time=lambda: self.cpu)
        monkeypatch.setattr(timing, "time", fake)
        system = SimpleNamespace(
            cpu_times=lambda: _Times(idle=7 * self.wall, user=self.cpu + others * self.wall)
        )
        monkeypatch.setattr(timing, "psutil", system)


class _Times(tuple):
    """As psutil's: a tuple that names its parts."""

    def __new__(cls, **parts):
        made = super().__new__(cls, parts.values())
        made.__dict__.update(parts)
        return made


class FakePass:
    """Runs for the seconds given, one after the other, and then for the last of them again."""

    def __init__(self, clock, name, *seconds, threads=1):
        self.clock, self.name, self.threads = clock, name, threads
        self.seconds = list(seconds)
        self.clean = False

    def clear(self):
        self.clean = True

    def run(self):
        assert self.clean, "gradients of the run before are added to"
        self.clean = False
        taken = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        self.clock.wall += taken
        self.clock.cpu += taken * self.threads
        self.clock.ran.append(self.name)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_figures_are_of_the_timed_passes_alone_in_milliseconds(clock):
    # The first warms up; the others are 10 to 50 ms, in no order.
    run = FakePass(clock, "a", 0.040, 0.030, 0.010, 0.050, 0.020, 0.040, threads=2)
    (found,) = time_passes([run], seconds=0.150)
    # Uneven passes are timed for up to three times as long: the last one repeats.
    assert found.samples == 5 + 8
    times = torch.tensor([30.0, 10, 50, 20, 40] + [40.0] * 8, dtype=torch.float64)
    expected = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    assert (found.low_ms, found.median_ms, found.high_ms) == pytest.approx(tuple(expected.tolist()))
    assert found.cpu_ms == pytest.approx(2 * found.median_ms)


def test_medians_of_two_lie_in_the_middle(clock):
    found = timing.time_so_often(FakePass(clock, "a", 1.0, 3.0), 2, "cpu")
    assert (found.median_ms, found.cpu_ms) == (2000, 2000)


def test_percentiles_are_the_20th_and_the_80th(clock):
    run = FakePass(clock, "a", 1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 1.0)
    (found,) = time_passes([run], seconds=50.0)  # three times 50 s is what the five take
    assert found.samples == 5
    assert (found.low_ms, found.median_ms, found.high_ms) == pytest.approx((18e3, 30e3, 42e3))


def test_the_first_pass_counts_only_where_it_is_long(clock):
    (found,) = time_passes([FakePass(clock, "a", 9.0, 1.0)], seconds=10.0)
    assert (found.samples, found.high_ms) == (10, 1e3)
    (found,) = time_passes([FakePass(clock, "a", 11.0)], seconds=10.0, min_samples=1)
    assert (found.samples, found.high_ms) == (1, 11e3)


def test_passes_take_turns(clock):
    passes = [FakePass(clock, name, 1.0) for name in "ab"]
    time_passes(passes, seconds=3.0)
    assert "".join(clock.ran) == "ab" + "ab" * 3


def test_each_pass_has_a_time_of_its_own(clock):
    passes = [FakePass(clock, name, 1.0) for name in "ab"]
    found = time_passes(passes, seconds=[6.0, 3.0])
    assert [each.samples for each in found] == [6, 3]


def test_quick_passes_run_several_times_a_turn(clock):
    (found,) = time_passes([FakePass(clock, "a", 0.001)], seconds=0.1)
    assert found.samples == 100
    assert timing._turn(0.001) == 20


def test_others_on_the_machine_are_seen_and_told(monkeypatch):
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(timing.torch, "get_num_threads", lambda: 1)
    quiet = Clock(monkeypatch, others=0.9)
    (found,) = time_passes([FakePass(quiet, "a", 1.0)], seconds=3.0)
    assert found.others == pytest.approx(0.9)
    assert found.remark == ""
    busy = Clock(monkeypatch, others=1.5)
    (found,) = time_passes([FakePass(busy, "a", 1.0)], seconds=3.0)
    assert found.remark == "busy: other processes took 1.5 of 2 cores"


def test_uneven_passes_are_told(clock):
    run = FakePass(clock, "a", *[1.0, 2.0] * 50)
    (found,) = time_passes([run], seconds=10.0)
    assert found.remark.startswith("uneven: from the 20th to the 80th percentile 67% of the")
    assert sum(clock.ran.count(name) for name in "a") > 18  # and timed for longer


def test_a_real_pass_is_timed_in_milliseconds():
    """Against a clock of its own: a unit that is off would show."""
    import time

    class Sleep:
        def clear(self):
            pass

        def run(self):
            time.sleep(0.02)

    (found,) = time_passes([Sleep()], seconds=0.06)
    assert 20 <= found.median_ms < 200
    assert found.cpu_ms < 20


@pytest.fixture
def point():
    return Point(**SIZES, tokens=6, pass_name="forward+backward")


def test_speed_follows_from_the_median(point):
    (figures,) = measure_group([point], [Workload(point)], seconds=0.001)
    assert figures["tokens_per_s"] == pytest.approx(6 / figures["median_ms"] * 1e3)


def test_peak_memory_is_that_of_a_pass_without_the_gradients_of_the_one_before(point):
    point = dataclasses.replace(point, num_subkeys=64)
    (figures,) = measure_group([point], [Workload(point)], seconds=0.001)
    fresh = Workload(point)
    fresh.whole.run()  # what is allocated in the first pass alone
    fresh.whole.clear()
    expected = measure_peak(fresh.whole.run, fresh.whole.gradients)
    assert figures["peak_bytes"] == expected.peak_bytes
    assert figures["working_bytes"] == expected.working_bytes
    # The table's gradient is among what a pass allocates, and is not working memory.
    assert expected.peak_bytes - expected.working_bytes >= 64**2 * 16 * 4


def test_the_parts_are_timed_in_the_rounds_of_the_whole(point, monkeypatch):
    seen = []
    real = time_passes

    def spy(passes, **options):
        seen.append(len(passes))
        return real(passes, **options)

    monkeypatch.setattr(timing, "time_passes", spy)
    points = [point, dataclasses.replace(point, implementation="textbook")]
    figures = measure_group(points, [Workload(each) for each in points], seconds=0.001)
    assert seen == [2 + 2 * 3]
    for each in figures:
        assert min(each["query_ms"], each["lookup_ms"], each["gather_ms"]) > 0


def test_the_roofline_is_the_share_of_the_bandwidth(point, monkeypatch):
    workload = Workload(point)
    moved = roofline.moved_bytes(point, workload.parts().distinct_slots)
    monkeypatch.setattr(roofline, "bandwidth", lambda _: 1e9)
    (figures,) = measure_group([point], [workload], seconds=0.001)
    assert figures["moved_bytes"] == moved
    assert figures["roofline"] == pytest.approx(moved / 1e9 / (figures["median_ms"] / 1e3))
