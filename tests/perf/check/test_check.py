"""The command: what it runs, writes, and finds."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.check.outcome import Report
from pkm_triton.perf.check.plants import PLANTS

REFERENCE = ["check", "--backend", "torch", "--output"]


@pytest.fixture
def _planted_until_the_end(monkeypatch):
    """What a plant changes for good in a process of its own is put back."""
    for package in ("pkm_triton.kernels", "pkm_triton.reference"):
        module = importlib.import_module(package)
        for functions, _ in PLANTS.values():
            for function in functions:
                monkeypatch.setattr(module, function, getattr(module, function))


def test_the_reference_passes_and_the_report_says_so(tmp_path, capsys):
    assert main([*REFERENCE, str(tmp_path), "--no-speed"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("PASS: ")
    report = Report.from_json(json.loads((tmp_path / "check.json").read_text()))
    assert report.passed
    groups = {"Lookup", "Gather", "Sample", "Scatter", "Second derivatives", "SparseAdam"}
    assert {line.group for line in report.lines} == groups | {"Machinery"}
    for line in report.lines:
        assert line.outcome.status in ("PASS", "SKIP")
        assert line.outcome.error is None or line.outcome.error <= line.outcome.allowed
    page = (tmp_path / "check.md").read_text()
    assert page.startswith("# pkm-perf check: PASS")
    assert torch.__version__ in page
    capsys.readouterr()
    assert main(["check", "--render", str(tmp_path / "check.json")]) == 0
    assert capsys.readouterr().out == page


NUMERICS = ["Lookup", "Gather", "Sample", "Scatter", "Second", "SparseAdam", "same bits"]


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.usefixtures("_planted_until_the_end")
def test_every_planted_bug_is_found(name, tmp_path, capsys):
    command = [*REFERENCE, str(tmp_path), "--plant", name, "--only", *NUMERICS]
    assert main(command) == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith(f"FAIL, with {name} planted: ")
    group = {"lookup": "Lookup", "flat": "Lookup", "gather": "Gather", "step": "SparseAdam"}
    group |= {"dense": "Gather", "sparse": "Gather", "factored": "SparseAdam"}
    group |= {"sample": "Sample", "scatter": "Scatter"}
    named = group[name.partition("-")[0]]
    # But for bits that change, which no tolerance can tell.
    named = "Machinery" if name == "gather-drifts" else named
    assert any(line.startswith(f"FAIL    {named}: ") for line in lines)
    assert not Report.from_json(json.loads((tmp_path / "check.json").read_text())).passed


INTERPRETED = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def interpret(tmp_path, *arguments):
    command = [sys.executable, "-m", "pkm_triton.perf", "check", "--output", str(tmp_path)]
    return subprocess.run(
        [*command, *arguments], env=INTERPRETED, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled here")
@pytest.mark.parametrize(
    "planted", [None, "gather-drops-a-read", "sparse-gradient-loses-a-row"], ids=str
)
def test_the_kernels_are_what_is_interpreted(planted, tmp_path):
    pytest.importorskip("triton")
    options = ["--only", "Gather: T=9", "one hot slot"]
    options += [] if planted is None else ["--plant", planted]
    done = interpret(tmp_path, *options)
    assert done.returncode == (0 if planted is None else 1), done.stdout + done.stderr
    report = Report.from_json(json.loads((tmp_path / "check.json").read_text()))
    assert report.machine["device"].endswith("kernels interpreted")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled here")
def test_all_kernels_pass_interpreted(tmp_path):
    done = interpret(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_and_an_interpreter_it_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["check", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pkm-perf: device: no GPU (torch ")
    assert "TRITON_INTERPRET=1 pkm-perf check interprets" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plant", "weeds"], "plant: 'weeds' is unknown; allowed: lookup-misses-the-best, "),
        (["--backend", "cuda"], "backend: 'cuda' is unknown; allowed: triton, torch"),
        (["--only", "nothing", "else"], "only: no check's name holds 'nothing'; allowed: a group"),
        (["--only", "Sample", "else"], "holds 'else'; allowed: a group (Lookup, Gather, Sample, "),
        (["--time-limit", "0"], "time-limit: 0.0 is not allowed"),
        (["--render", "/nowhere.json"], "render: '/nowhere.json' cannot be read (No such file"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert main([*REFERENCE, str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_when_time_is_up_the_report_is_not_finished(tmp_path, capsys):
    command = [*REFERENCE, str(tmp_path), "--time-limit", "1e-9", "--only", "no tokens"]
    assert main(command) == 1
    assert capsys.readouterr().out.startswith("NOT FINISHED: time is up: ")
    assert (tmp_path / "check.md").read_text().startswith("# pkm-perf check: NOT FINISHED")


BLOCK = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {blocked} else find(name, path, target)
PathFinder.find_spec = find_spec
from pkm_triton.perf.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
LIBRARIES = {"pandas", "matplotlib", "psutil", "tqdm", "numpy", "pytest", "tokenizers"}


def without(blocked, *arguments):
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


PLANNED = """
import pkm_triton as pkm
from pkm_triton.compiling import launches_of
from pkm_triton.perf.check import machine
with machine.compiling("triton") as compiled:
    layer = pkm.ProductKeyMemory(8, num_subkeys=4, heads=1, top_k=2, query_dim=4)
    print(len(launches_of([layer], 2, pkm.optim.SparseAdam([layer.values]))))
"""


def test_compiling_on_a_gpu_needs_no_numpy():
    code = BLOCK.format(blocked=LIBRARIES).rpartition("from pkm_triton.perf")[0] + PLANNED
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_torch_and_triton_are_all_it_needs(tmp_path):
    done = without(LIBRARIES, *REFERENCE, str(tmp_path), "--only", "no tokens", "SparseAdam")
    assert done.returncode == 0, done.stderr
    done = without(LIBRARIES | {"torch", "triton"}, "check", "--render", tmp_path / "check.json")
    assert done.stdout.startswith("# pkm-perf check: PASS"), done.stderr
