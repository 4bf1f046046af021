"""Outcomes, the rule of tolerance, the page, and measurements on what stands in for a GPU."""

import dataclasses

import pytest
import torch

from pkm_triton.perf.check import oracle, speed
from pkm_triton.perf.check.outcome import INFO, Check, Line, Outcome, Report
from pkm_triton.perf.check.page import markdown, terminal_line
from pkm_triton.perf.check.run import do
from pkm_triton.perf.check.setting import Setting
from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.points import Point

EXACT = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def test_twice_the_error_of_pytorch_and_rounding_are_allowed():
    plain = EXACT.float() + torch.tensor([0.0, 0.5, 0.0])
    floor = oracle.rounding_floor(EXACT, torch.float32)
    assert 0 < floor < 1e-6
    for error, status in ((1.0, "PASS"), (-1.0, "PASS"), (1.01, "FAIL")):
        outcome = oracle.compare(EXACT.float() + error, EXACT, EXACT.float(), plain, note="it")
        assert outcome.status == status
        assert outcome.error == pytest.approx(abs(error))
        assert outcome.allowed == pytest.approx(1.0 + floor)
    assert outcome.note == "it"


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, torch.inf, torch.nan], "PASS"),
        ([1.0, -torch.inf, torch.nan], "FAIL"),
        ([1.0, torch.inf, 3.0], "FAIL"),
        ([torch.nan, torch.inf, torch.nan], "FAIL"),
        ([2.0, torch.inf, torch.nan], "FAIL"),
    ],
)
def test_infinities_and_nan_must_be_where_they_belong(actual, expected):
    exact = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    assert oracle.compare(torch.tensor(actual), exact, exact.float()).status == expected


def test_another_shape_fails():
    outcome = oracle.compare(EXACT[:2], EXACT, EXACT.float(), note="the output")
    assert outcome.note == "the output has shape [2], not [3]"


def fail(error):
    raise error


def test_what_breaks_off_is_a_line_and_the_next_is_done():
    checks = [
        Check("A", "memory", lambda: fail(torch.OutOfMemoryError("CUDA out of memory."))),
        Check("A", "error", lambda: fail(RuntimeError("an illegal\nmemory access"))),
        Check("A", "fine", lambda: Outcome("PASS", 0.0, 1.0)),
    ]
    lines = list(do(checks))
    statuses = [line.outcome.status for line in lines]
    assert statuses == ["OUT OF MEMORY", "ERROR", "PASS"]
    assert lines[1].outcome.note == "RuntimeError: an illegal memory access"
    report = Report({}, {}, lines, complete=True)
    assert not report.passed
    assert [line.name for line in report.failed] == ["memory", "error"]
    assert Report({}, {}, lines[2:], complete=True).passed
    assert not Report({}, {}, lines[2:]).passed
    # A measurement that breaks off proves nothing against the library.
    measured = dataclasses.replace(lines[0], group="Speed")
    assert Report({}, {}, [measured, lines[2]], complete=True).passed
    skipped = dataclasses.replace(lines[2], outcome=Outcome("SKIP"))
    assert not Report({}, {}, [skipped], complete=True).passed


@pytest.fixture
def report():
    """As of a GPU: checks, a failure, and measurements."""
    figures = {"first call s": 2.5, "ms": 0.125, "GB/s": 2100.0, "share of the copy": 0.62}
    slower = Outcome(INFO, figures={"ms": 1.0, "embedding_bag / ours": 1.5}, note="fbgemm: absent")
    lines = [
        Line("Lookup", "product |C|=512", Outcome("PASS", 1e-7, 3e-7), 0.1),
        Line("Gather", "T=1", Outcome("FAIL", 0.5, 0.01, "the output"), 0.1),
        Line("Speed", "lookup, T=16384", Outcome(INFO, figures=figures), 3.0),
        Line("Speed", "gather, T=16384", slower, 3.0),
        Line("Speed", "layer, step", Outcome("OUT OF MEMORY", note="tried 9 GiB"), 3.0),
    ]
    machine = {"device": "NVIDIA H100 80GB HBM3", "commit": "", "clocks before": "driver 580.1"}
    return Report(machine, {"quick": False, "plant": None}, lines, complete=True)


def test_the_page_of_a_recorded_report(report):
    page = markdown(Report.from_json(report.as_json()))
    assert page == markdown(report)
    lines = page.splitlines()
    assert lines[0] == "# pkm-perf check: FAIL"
    assert "1 PASS, 1 FAIL, 2 INFO, 1 OUT OF MEMORY." in lines
    assert "- Gather: T=1" in lines
    assert "| device | NVIDIA H100 80GB HBM3 |" in lines
    assert not any(line.startswith("| commit") for line in lines)
    assert "| product \\|C\\|=512 | PASS | 1.0e-07 | 3.0e-07 |  |" in lines
    assert "| T=1 | FAIL | 5.0e-01 | 1.0e-02 | the output |" in lines
    header = "| measured | first call s | ms | GB/s | share of the copy | embedding_bag / ours | |"
    assert header in lines
    assert "| lookup, T=16384 | 2.5 | 0.125 | 2,100 | 0.62 |  |  |" in lines
    assert "| gather, T=16384 |  | 1 |  |  | 1.5 | fbgemm: absent |" in lines
    assert "| layer, step |  |  |  |  |  | OUT OF MEMORY: tried 9 GiB |" in lines
    assert terminal_line(report.lines[1]) == (
        "FAIL    Gather: T=1  error 5.0e-01, allowed 1.0e-02  the output"
    )


@pytest.mark.parametrize("damage", [{"format": 99}, {"lines": [{"group": "A"}]}, {"lines": None}])
def test_a_damaged_report_is_refused(report, damage):
    with pytest.raises(ValueError, match="render: "):
        Report.from_json({**report.as_json(), **damage})
    with pytest.raises(ValueError, match="render: no report"):
        Report.from_json([])


POINT = Point(
    num_subkeys=16, top_k=4, heads=2, dim=16, value_dim=16, query_dim=8, query_norm="layer",
    tokens=12, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.002)
    return Setting(torch.device("cpu"), small=True)


def test_measurements_are_shares_of_what_was_measured(setting):
    peaks = {}
    found = speed._peaks(setting, peaks, num_bytes=2**20, size=64)
    assert found.figures["GB/s"] == peaks["bytes"] / 1e9
    assert peaks["flops"] > 0
    for run, moved in (
        (speed._lookup, roofline.lookup_bytes(POINT)),
        (speed._gather, None),
    ):
        outcome = run(setting, POINT, {"bytes": 1e9, "flops": 1e9})
        figures = outcome.figures
        assert outcome.status == INFO
        assert figures["share of the copy"] == pytest.approx(figures["GB/s"])
        if moved:
            assert figures["GB/s"] == pytest.approx(moved / (figures["ms"] / 1e3) / 1e9)
            flops = 2 * 12 * 2 * 2 * 16 * 4
            share = flops / (figures["ms"] / 1e3) / 1e9
            assert figures["share of the product"] == pytest.approx(share)
    for sparse in (False, True):
        outcome = speed._gather_backward(sparse, setting, POINT, peaks)
        assert outcome.figures["ms"] > 0
    step = speed._step(setting, POINT, peaks)
    assert step.figures["torch SparseAdam / ours"] > 0


@pytest.mark.parametrize("pass_name", ["forward+backward", "step"])
def test_layers_stand_beside_the_textbooks(setting, pass_name):
    point = dataclasses.replace(POINT, pass_name=pass_name, sparse_grad=True)
    outcome = speed._layer(setting, point)
    assert outcome.figures["first call s"] > 0
    assert outcome.figures["textbook / ours"] > 0


def test_an_alternative_that_fails_is_told(setting):
    class Broken:
        def run(self):
            raise RuntimeError("no kernel image")

    class Works:
        def clear(self):
            pass

        def run(self):
            pass

    outcome = speed._side_by_side(setting, Works(), {"other": Broken})
    assert outcome.note == "other: RuntimeError"
    assert "other / ours" not in outcome.figures
