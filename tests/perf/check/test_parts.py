"""Outcomes, the rule of tolerance, the page, and measurements on what stands in for a GPU."""

import dataclasses
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import pkm_triton as pkm
from pkm_triton.perf.check import oracle, speed
from pkm_triton.perf.check.outcome import INFO, Check, Line, Outcome, Report
from pkm_triton.perf.check.page import markdown, terminal_line
from pkm_triton.perf.check.run import do
from pkm_triton.perf.check.setting import Setting
from pkm_triton.perf.measure import fbgemm, roofline
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


@pytest.mark.parametrize(
    ("outcomes", "complete", "verdict"),
    [
        ({"Gather": "PASS", "Speed": "INFO"}, True, "PASS"),
        ({"Gather": "PASS", "Speed": "INFO"}, False, "NOT FINISHED"),
        ({"Gather": "FAIL", "Speed": "INFO"}, False, "FAIL"),
        ({"Gather": "SKIP", "Speed": "INFO"}, True, "FAIL"),
        ({"Speed": "INFO"}, True, "MEASURED"),
        ({"Speed": "INFO"}, False, "NOT FINISHED"),
        ({"Speed": "OUT OF MEMORY"}, True, "FAIL"),
    ],
)
def test_the_verdict(outcomes, complete, verdict):
    lines = [Line(group, "it", Outcome(status), 0.1) for group, status in outcomes.items()]
    report = Report({}, {}, lines, complete)
    assert report.verdict == verdict
    assert markdown(report).startswith(f"# pkm-perf check: {verdict}\n")
    assert report.passed == (verdict == "PASS")


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


def test_the_page_says_what_compiling_took(report):
    report.compiled |= {"gather_values_kernel": [0.5], "select_kernel": [1.25, 2.25]}
    page = markdown(Report.from_json(report.as_json())).splitlines()
    place = page.index("## Compiling")
    assert page[place + 4 : place + 6] == [
        "| select_kernel | 2 | 3.5 | 2.2 |",
        "| gather_values_kernel | 1 | 0.5 | 0.5 |",
    ]
    older = {name: each for name, each in report.as_json().items() if name != "compiled"}
    assert "## Compiling" not in markdown(Report.from_json(older))


FAKE_FBGEMM = {
    "split_embedding_configs": {"SparseType": SimpleNamespace(from_dtype=lambda dtype: dtype)},
    "split_table_batched_embeddings_ops_common": {"PoolingMode": SimpleNamespace(SUM="sum")},
}


class FakeTable:
    """Takes what FBGEMM's table takes."""

    def __init__(self, specs, *, weights_precision, pooling_mode, use_cpu, output_dtype):
        assert weights_precision == output_dtype
        assert (pooling_mode, use_cpu) == ("sum", True)
        ((self.rows, self.width),) = specs
        self.weights = torch.zeros(self.rows * self.width, dtype=weights_precision)

    def __call__(self, indices, offsets, per_sample_weights):
        table = self.weights.view(self.rows, self.width).float()
        return torch.nn.functional.embedding_bag(
            indices, table, offsets, mode="sum", per_sample_weights=per_sample_weights,
            include_last_offset=True,
        )  # fmt: skip


@pytest.fixture
def fake_fbgemm(monkeypatch):
    parts = {
        **FAKE_FBGEMM,
        "split_table_batched_embeddings_ops_training": {
            "DenseTableBatchedEmbeddingBagsCodegen": FakeTable
        },
    }
    package = ModuleType("fbgemm_gpu")
    package.__spec__ = ModuleSpec("fbgemm_gpu", None)
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", package)
    for name, contents in parts.items():
        module = ModuleType(f"fbgemm_gpu.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"fbgemm_gpu.{name}", module)


def test_fbgemm_gathers_the_same(fake_fbgemm):
    values = torch.randn(9, 5)
    slots = torch.randint(9, (4, 3), dtype=torch.int32)
    weights = torch.rand(4, 3)
    found = fbgemm.make_gather(values, slots)(weights)
    torch.testing.assert_close(found, pkm.gather_values(values, slots, weights))


def test_fbgemm_is_measured_where_it_is_installed(setting, fake_fbgemm):
    peaks = {"bytes": 1e9, "flops": 1e9}
    assert speed._gather(setting, POINT, peaks).figures["FBGEMM / ours"] > 0


def test_fbgemm_that_fails_is_a_note(setting, fake_fbgemm, monkeypatch):
    monkeypatch.setattr(fbgemm, "make_gather", lambda *_: fail(RuntimeError("no bfloat16 table")))
    outcome = speed._gather(setting, POINT, {"bytes": 1e9, "flops": 1e9})
    assert outcome.note == "FBGEMM: RuntimeError: no bfloat16 table"
    assert "FBGEMM / ours" not in outcome.figures


def test_fbgemm_is_not_named_where_it_is_not(setting):
    assert not fbgemm.is_installed()
    outcome = speed._gather(setting, POINT, {"bytes": 1e9, "flops": 1e9})
    assert "FBGEMM" not in str(outcome)


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
    assert outcome.note == "other: RuntimeError: no kernel image"
    assert "other / ours" not in outcome.figures
