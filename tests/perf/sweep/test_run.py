import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from importlib.util import find_spec

import pytest
import torch

from pkm_triton.perf.measure import timing
from pkm_triton.perf.measure.workload import Workload, build_memory, build_optimizers
from pkm_triton.perf.records.environment import device_name
from pkm_triton.perf.records.points import Point
from pkm_triton.perf.records.sweep_row import Row, RowFile, read_rows
from pkm_triton.perf.sweep import run as sweep
from pkm_triton.perf.sweep.predict import predicted_bytes, predicted_seconds
from pkm_triton.perf.sweep.run import Limits, open_points, run_sweep

TINY = {"num_subkeys": 8, "top_k": 4, "heads": 2, "dim": 16, "value_dim": 16, "query_dim": 8}
TINY |= {"tokens": 6}
FAST = Limits(seconds=0.001)


@pytest.fixture
def file(tmp_path):
    return RowFile(tmp_path / "sweep.csv")


def test_a_row_has_its_figures(file):
    point = Point(**TINY, pass_name="forward+backward", sparse_grad=True)
    assert run_sweep([point], file, FAST) == 1
    (row,) = read_rows(file.path)
    assert row.status == "ok"
    assert 0 < row.low_ms <= row.median_ms <= row.high_ms
    assert row.samples >= 3
    assert row.tokens_per_s == pytest.approx(6 / row.median_ms * 1e3)
    assert min(row.query_ms, row.lookup_ms, row.gather_ms) > 0
    assert row.peak_bytes > row.working_bytes > 0
    assert row.parameter_bytes >= 4 * (64 * 16 + 2 * 2 * 8 * 4 + 16 * 16)
    assert row.moved_bytes > 0
    assert row.roofline != row.roofline or row.device == "cuda"
    assert row.graph_ms != row.graph_ms or row.device == "cuda"
    assert row.first_call_s > 0
    on_cpu = row.device == "cpu"
    assert math.isnan(row.compile_s) == math.isnan(row.product_flops_per_s) == on_cpu
    assert 1e8 < row.copy_bytes_per_s < 1e13
    assert (row.seed, row.seconds) == (0, 0.001)
    assert row.cpu_ms >= 0
    assert row.others >= 0
    assert row.torch_version == torch.__version__
    assert row.device_name == device_name("cpu")


@pytest.mark.parametrize("reads", ["layer", "uniform", "zipf"])
@pytest.mark.parametrize("keys", ["product", "flat"])
@pytest.mark.parametrize("implementation", ["pkm_triton", "textbook"])
@pytest.mark.parametrize("pass_name", ["forward", "forward+backward"])
def test_every_kind_of_point_runs(reads, keys, implementation, pass_name, file):
    point = Point(
        **TINY, reads=reads, keys=keys, implementation=implementation, pass_name=pass_name
    )
    run_sweep([point], file, FAST)
    assert [row.status for row in file.rows] == ["ok"]


@pytest.mark.parametrize("reads", ["layer", "zipf"])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("implementation", ["pkm_triton", "textbook"])
def test_a_step_moves_the_parameters(implementation, sparse_grad, reads, file):
    point = Point(
        **TINY,
        implementation=implementation,
        pass_name="step",
        sparse_grad=sparse_grad,
        reads=reads,
    )
    workload = Workload(point)
    before = [parameter.clone() for parameter in workload.memory.parameters()]
    workload.whole.run()
    for old, new in zip(before, workload.memory.parameters(), strict=True):
        assert not torch.equal(old, new)
    run_sweep([point], file, FAST)
    assert [row.status for row in file.rows] == ["ok"]


def test_a_fused_step_is_the_step(file):
    points = [Point(**TINY, pass_name=name, sparse_grad=True) for name in ("step", "fused-step")]
    workloads = [Workload(point) for point in points]
    for workload in workloads:
        workload.whole.run()
    for one, other in zip(*(each.memory.parameters() for each in workloads), strict=True):
        assert torch.equal(one, other)
    textbook = Point(**TINY, implementation="textbook", pass_name="fused-step", sparse_grad=True)
    run_sweep([*points, textbook], file, FAST)
    assert [row.status for row in file.rows] == [
        "ok", "ok", "skipped: pkm_triton alone keeps gradients as factors",
    ]  # fmt: skip
    step, fused = file.rows[:2]
    assert fused.moved_bytes < step.moved_bytes
    assert fused.peak_bytes > fused.working_bytes > 0


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_norms_and_dtypes_run(norm, dtype, file):
    run_sweep([Point(**TINY, query_norm=norm, dtype=dtype)], file, FAST)
    assert [row.status for row in file.rows] == ["ok"]


def test_generated_reads_are_what_the_gather_reads():
    workload = Workload(Point(**{**TINY, "tokens": 500}, reads="uniform"))
    assert workload.parts().distinct_slots == 64  # nothing is left unread by 4000 draws


def test_the_same_seed_makes_the_same_layer_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, second = (Workload(Point(**TINY), seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.memory.parameters(), second.memory.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_seed_of_a_sweep_is_that_of_its_layers_and_stands_in_its_rows(file, monkeypatch):
    layers = []

    class Probe(Workload):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            layers.append(self)

    monkeypatch.setattr(sweep, "Workload", Probe)
    for seed in (0, 5, 5):
        run_sweep([Point(**TINY)], file, FAST, seed=seed)
    assert [row.seed for row in read_rows(file.path)] == [0, 5]
    expected = [Workload(Point(**TINY), seed=seed) for seed in (0, 5)]
    assert not torch.equal(layers[0].memory.layer.values, layers[1].memory.layer.values)
    for layer, other in zip(layers, expected, strict=True):
        assert torch.equal(layer.memory.layer.values, other.memory.layer.values)
        assert torch.equal(layer._x, other._x)


def test_another_time_asked_for_is_another_measurement(file):
    run_sweep([Point(**TINY)], file, FAST)
    assert run_sweep([Point(**TINY)], file, FAST) == 0
    assert run_sweep([Point(**TINY)], file, Limits(seconds=0.002)) == 1
    assert [row.seconds for row in read_rows(file.path)] == [0.001, 0.002]


def test_rows_with_a_remark_are_measured_again_when_that_is_asked_for(file):
    file.add(a_row(**TINY, seconds=0.001, remark="busy: other processes took 3.0 of 2 cores"))
    assert run_sweep([Point(**TINY)], file, FAST) == 0
    assert run_sweep([Point(**TINY)], file, FAST, retry=True) == 1


def test_what_an_unreliable_row_is_compared_with_is_measured_again_beside_it(file):
    ours, textbook = Point(**TINY), Point(**TINY, implementation="textbook")
    other = Point(**{**TINY, "top_k": 1})
    file.add(
        a_row(**TINY, seconds=0.001),
        a_row(**TINY, seconds=0.001, implementation="textbook", remark="busy: x"),
        a_row(**{**TINY, "top_k": 1}, seconds=0.001),
    )
    found = open_points([ours, textbook, other], file, FAST, 0, retry=True)
    assert found == [ours, textbook]
    assert open_points([ours, textbook, other], file, FAST, 0, retry=False) == []


def test_measured_points_are_not_measured_again(file, monkeypatch):
    points = [Point(**{**TINY, "top_k": top_k}) for top_k in (1, 2, 3)]
    assert run_sweep(points[:2], file, FAST) == 2
    before = file.path.read_text()
    again = RowFile(file.path)
    assert run_sweep(points[:2], again, FAST) == 0
    assert file.path.read_text() == before
    assert run_sweep(points, again, FAST) == 1
    assert [row.top_k for row in read_rows(file.path)] == [1, 2, 3]


def test_threads_are_set_for_a_point_and_put_back(file):
    threads = torch.get_num_threads()
    seen = []

    class Probe(Workload):
        def __init__(self, *args, **kwargs):
            seen.append(torch.get_num_threads())
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "Workload", Probe)
        run_sweep([Point(**TINY, threads=1), Point(**TINY, threads=2)], file, FAST)
    assert seen == [1, 2]
    assert torch.get_num_threads() == threads


def test_a_failing_baseline_is_recorded_and_the_others_are_measured(file):
    pytest.importorskip("product_key_memory")
    # More reads a head than a codebook has sub-keys: only our layer can do that.
    sizes = {**TINY, "top_k": 10, "query_norm": "layer"}
    names = ("product-key-memory", "textbook", "pkm_triton")
    run_sweep([Point(**sizes, implementation=name) for name in names], file, FAST)
    status = {row.implementation: row.status for row in read_rows(file.path)}
    assert status["pkm_triton"] == "ok"
    assert status["textbook"].startswith("failed: RuntimeError: ")
    assert status["product-key-memory"].startswith("failed: ")


def test_a_missing_package_is_recorded(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    run_sweep([Point(**TINY, implementation="product-key-memory", query_norm="layer")], file, FAST)
    assert file.rows[0].status.startswith(
        "skipped: the package product-key-memory is not installed"
    )


def test_what_an_implementation_cannot_do_is_skipped(file):
    run_sweep([Point(**TINY, implementation="product-key-memory")], file, FAST)
    assert file.rows[0].status == "skipped: product-key-memory knows query_norm layer only"


def test_a_baseline_that_fails_while_it_is_timed_does_not_take_ours_with_it(file, monkeypatch):
    real = sweep.measure_group

    def fail_for_the_textbook(points, workloads, **options):
        if any(point.implementation == "textbook" for point in points):
            raise RuntimeError("no kernel image")
        return real(points, workloads, **options)

    monkeypatch.setattr(sweep, "measure_group", fail_for_the_textbook)
    points = [Point(**TINY, implementation=name) for name in ("textbook", "pkm_triton")]
    run_sweep(points, file, FAST)
    status = {row.implementation: row.status for row in read_rows(file.path)}
    assert status == {"textbook": "failed: RuntimeError: no kernel image", "pkm_triton": "ok"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "oom: CUDA out of memory."),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB"),
            "oom: DefaultCPUAllocator: can't allocate memory: you tried 4 TB",
        ),
        (KeyError("a\nb"), "failed: KeyError: 'a\\nb'"),
        (RuntimeError("x" * 500), "failed: RuntimeError: " + "x" * 197 + "..."),
    ],
)
def test_errors_become_a_status(error, status, file, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sweep, "measure_group", fail)
    run_sweep([Point(**TINY)], file, FAST)
    assert read_rows(file.path)[0].status == status


def test_a_point_above_the_memory_limit_is_skipped_with_both_figures(file):
    point = Point(num_subkeys=2048, dim=64, value_dim=64)
    needed = predicted_bytes(point) / 2**30
    run_sweep([point], file, Limits(seconds=0.001, memory_bytes=2**28))
    assert file.rows[0].status == (
        f"skipped: predicted memory {needed:.1f} GiB, above the 0.2 GiB allowed (--memory-limit)"
    )


def test_a_point_above_the_machines_memory_is_skipped(file):
    run_sweep([Point(num_subkeys=40_000, dim=4096, value_dim=4096)], file, FAST)
    assert file.rows[0].status.startswith("skipped: predicted memory 24")
    assert file.rows[0].status.endswith("GiB available")


def test_what_does_not_fit_together_is_measured_one_after_the_other(file, monkeypatch):
    names = ("pkm_triton", "textbook")
    points = [Point(**TINY, implementation=name) for name in names]
    needed = [predicted_bytes(point) for point in points]
    groups = []
    real = sweep.measure_group

    def spy(some, *args, **options):
        groups.append([point.implementation for point in some])
        return real(some, *args, **options)

    monkeypatch.setattr(sweep, "measure_group", spy)
    run_sweep(points, file, Limits(seconds=0.001, memory_bytes=sum(needed)))
    run_sweep(points, file, Limits(seconds=0.002, memory_bytes=sum(needed) - 1))
    assert groups == [["pkm_triton", "textbook"], ["pkm_triton"], ["textbook"]]
    assert [row.status for row in file.rows] == ["ok"] * 4


def test_a_table_is_freed_before_the_next_is_made(file, monkeypatch):
    points = [Point(**{**TINY, "num_subkeys": size}, reads="uniform") for size in (8, 16)]
    alive = []
    made = sweep.Workload

    def make(*args, **options):
        assert not any(each() for each in alive)
        workload = made(*args, **options)
        alive.append(weakref.ref(workload))
        return workload

    monkeypatch.setattr(sweep, "Workload", make)
    run_sweep(points, file, FAST)
    assert len(alive) == 2
    assert [row.status for row in file.rows] == ["ok", "ok"]


def test_every_compiled_point_is_compiled_for_its_sizes(file, monkeypatch):
    compiled = []
    real = torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def compile_by_it(function, **options):
        return real(function, backend=backend, dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", compile_by_it)
    points = [
        Point(**{**TINY, "num_subkeys": size, "tokens": size}, implementation="textbook-compiled")
        for size in range(4, 14)
    ]
    run_sweep(points, file, FAST)
    assert [row.status for row in file.rows] == ["ok"] * 10
    assert len(compiled) == 10
    for graph in compiled:
        kinds = {type(node.meta.get("example_value")) for node in graph.graph.nodes}
        assert torch.SymInt not in kinds


def test_retry_measures_what_was_skipped(file):
    point = Point(**TINY)
    run_sweep([point], file, Limits(seconds=0.001, memory_bytes=1))
    assert run_sweep([point], file, FAST) == 0
    assert run_sweep([point], file, FAST, retry=True) == 1
    assert [row.status for row in read_rows(file.path)] == ["ok"]


def test_predicted_memory_is_not_below_what_is_needed(file):
    points = [
        Point(num_subkeys=128, dim=128, value_dim=128, **kind)
        for kind in (
            {},
            {"keys": "flat"},
            {"implementation": "textbook", "top_k": 64},
            {"pass_name": "forward+backward"},
            {"pass_name": "forward+backward", "sparse_grad": True},
            {"pass_name": "step"},
            {"pass_name": "step", "sparse_grad": True},
            {"pass_name": "step", "sparse_grad": True, "dtype": "bfloat16"},
            {"pass_name": "step", "sparse_grad": True, "implementation": "textbook"},
            {"pass_name": "fused-step", "sparse_grad": True},
            {"implementation": "product-key-memory", "query_norm": "layer", "top_k": 64},
        )
        if kind.get("implementation") != "product-key-memory" or find_spec("product_key_memory")
    ]
    run_sweep(points, file, FAST)
    for point, row in zip(points, file.rows, strict=True):
        assert row.ok, row.status
        assert row.parameter_bytes + row.peak_bytes <= predicted_bytes(point), row.label()


def a_row(**changes):
    median = changes.get("median_ms", 100.0)
    figures = {"median_ms": median, "low_ms": median, "high_ms": median}
    return Row(**{"device_name": device_name("cpu"), **figures, **changes})


def test_time_is_predicted_from_the_nearest_smaller_memory():
    rows = [
        a_row(keys="flat", num_subkeys=128, median_ms=1e6),
        a_row(keys="flat", num_subkeys=256),
        a_row(keys="flat", num_subkeys=384, status="failed: x"),
        a_row(keys="flat", num_subkeys=384, heads=8),
        a_row(num_subkeys=256),
    ]
    assert predicted_seconds(Point(keys="flat", num_subkeys=512), rows) == pytest.approx(0.4)
    assert predicted_seconds(Point(num_subkeys=512), rows) == pytest.approx(0.2)
    assert predicted_seconds(Point(num_subkeys=128), rows) is None
    elsewhere = [dataclasses.replace(row, device_name="another CPU") for row in rows]
    assert predicted_seconds(Point(num_subkeys=512), elsewhere) is None


@pytest.mark.parametrize(("sparse_grad", "seconds"), [(False, 0.4), (True, 0.2)])
def test_a_dense_gradient_is_predicted_to_take_time_by_slots(sparse_grad, seconds):
    trained = {"pass_name": "forward+backward", "sparse_grad": sparse_grad}
    rows = [a_row(num_subkeys=256, **trained)]
    assert predicted_seconds(Point(num_subkeys=512, **trained), rows) == pytest.approx(seconds)


def test_a_point_predicted_to_be_slow_is_skipped(file):
    file.add(a_row(**TINY, keys="flat", median_ms=4000.0))
    limits = Limits(seconds=0.001, pass_seconds=10)
    run_sweep([Point(**{**TINY, "num_subkeys": 16}, keys="flat")], file, limits)
    assert file.rows[1].status == (
        "skipped: predicted time 16 s a pass, above the 10 s allowed (--time-limit)"
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seconds", {"seconds": 0}),
        ("time-limit", {"pass_seconds": -1}),
        ("memory-limit", {"memory_bytes": float("nan")}),
    ],
)
def test_limits_are_above_zero(name, changes):
    with pytest.raises(ValueError, match=f"{name}: .* number above 0"):
        Limits(**changes)


def test_no_point_is_timed_for_ever():
    with pytest.raises(ValueError, match="seconds: inf is not allowed"):
        Limits(seconds=float("inf"))
    assert Limits(pass_seconds=float("inf")).pass_seconds > 1e9


@pytest.mark.parametrize("implementation", ["pkm_triton", "textbook"])
def test_adam_is_the_fused_one(implementation):
    point = Point(**TINY, implementation=implementation, pass_name="step")
    for optimiser in build_optimizers(point, build_memory(point)):
        assert type(optimiser) is torch.optim.Adam
        assert optimiser.defaults["fused"]


def test_a_killed_sweep_keeps_every_row_and_goes_on(tmp_path):
    """Kill a sweep without warning, several times, until it gets to its end."""
    tops = [str(top) for top in range(1, 25)]
    command = [sys.executable, "-m", "pkm_triton.perf", "sweep", "--output", str(tmp_path)]
    command += ["--preset", "quick", "--num-subkeys", "16", "--heads", "1", "--dim", "16"]
    command += ["--query-dim", "8", "--tokens", "4", "--seconds", "0.01", "--device", "cpu"]
    command += ["--implementation", "pkm_triton", "--keys", "product", "--pass", "forward"]
    command += ["--query-norm", "batch", "--top-k", *tops]
    path = tmp_path / "sweep.csv"
    seen = 0
    for _ in range(2):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
            deadline = time.monotonic() + 60
            while running.poll() is None and time.monotonic() < deadline:
                if path.exists() and len(read_rows(path)) >= seen + 4:
                    break
                time.sleep(0.002)
            assert running.poll() is None, "the sweep ended before it could be killed"
            os.kill(running.pid, signal.SIGKILL)
        rows = read_rows(path)
        assert len(rows) >= seen + 4
        assert len({row.key for row in rows}) == len(rows)
        seen = len(rows)
    before = {row.top_k: row.median_ms for row in rows}
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{24 - seen} points measured, {seen} were there already" in done.stdout
    after = {row.top_k: row.median_ms for row in read_rows(path)}
    assert len(after) == 24
    assert {top: after[top] for top in before} == before


def test_compiling_is_told_before_it_begins(file, monkeypatch):
    told = []

    def fail(*_, **__):
        told.append("made")
        raise RuntimeError("no compiler")

    monkeypatch.setattr(sweep, "progress_of", lambda count: lambda label, done: told.append(label))
    monkeypatch.setattr(sweep.Workload, "warm_up", fail)
    compiled = Point(**TINY, implementation="textbook-compiled")
    run_sweep([Point(**TINY), compiled], file, FAST)
    # On a CPU our own layer has nothing to compile.
    own = Point(**TINY).label()
    assert told[:3] == [own, "made", f"compiling {compiled.label()}"]
    assert told[-1] == own


@pytest.mark.parametrize("graphs", [False, True])
def test_graphs_are_timed_where_they_are_asked_for(graphs, file, monkeypatch):
    monkeypatch.setattr(timing, "_graph_ms", lambda *_: 0.25)
    run_sweep([Point(**TINY)], file, dataclasses.replace(FAST, graphs=graphs))
    (row,) = file.rows
    assert row.graph_ms == 0.25 if graphs else math.isnan(row.graph_ms)
