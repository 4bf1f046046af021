"""What a check does about GPUs that are full, hidden, too old or absent: pretended ones."""

import os
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.check import ahead, lookups, machine, machinery, planning, reads, tables
from pkm_triton.perf.check.outcome import Check, Outcome
from pkm_triton.perf.check.run import do
from pkm_triton.perf.check.setting import Setting

GPU = torch.device("cuda", 1)


@pytest.fixture
def _gpu(monkeypatch):
    """A GPU, as far as torch is asked for one."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from triton.runtime import driver

    driver.set_active(SimpleNamespace(get_current_target=lambda: "sm_90"))
    yield
    driver.set_active(None)


def complaint(capsys):
    assert main(["check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    ],
)
@pytest.mark.usefixtures("_gpu")
def test_a_full_gpu_is_told_before_the_checks(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "zeros", fail)
    line = complaint(capsys)
    assert line.startswith("pkm-perf: device: the GPU cannot be used (CUDA ")
    assert "Does another process fill it" in line
    assert line.endswith("nvidia-smi tells; CUDA_VISIBLE_DEVICES chooses another one")


@pytest.mark.usefixtures("_gpu")
def test_a_driver_older_than_the_toolkit(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = complaint(capsys)
    assert "is the driver as new as its toolkit, 13.0? nvidia-smi tells" in line
    assert "TRITON_INTERPRET=1 pkm-perf check interprets" in line
    assert main(["sweep", "--device", "cuda"]) == 2
    assert "is the driver as new as its toolkit, 13.0?" in capsys.readouterr().err


@pytest.mark.usefixtures("_gpu")
def test_what_is_interpreted_is_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with planning.prepared("triton", None) as device:
        assert device == torch.device("cpu")


@pytest.mark.usefixtures("_gpu")
def test_an_architecture_too_old(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    line = complaint(capsys)
    assert "NVIDIA H100 has compute capability 7.5; the kernels need 8.0 or higher" in line
    assert "--backend torch" in line


@pytest.mark.usefixtures("_gpu")
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    line = complaint(capsys)
    assert f"triton cannot write its kernels in '{tmp_path}/file/cache'" in line
    assert "set TRITON_CACHE_DIR to a folder that can be written" in line


@pytest.mark.usefixtures("_gpu")
def test_the_cache_is_where_triton_looks(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "home_dir", str(tmp_path))
    with planning.prepared("triton", None) as device:
        assert device == GPU
    assert (tmp_path / ".triton" / "cache").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),
    ],
)
@pytest.mark.usefixtures("_gpu")
def test_a_compiler_that_is_missing(error, tmp_path, monkeypatch, capsys):
    from triton.runtime import driver

    def fail():
        raise error

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver.set_active(SimpleNamespace(get_current_target=fail))
    line = complaint(capsys)
    assert line.startswith("pkm-perf: device: triton cannot start here (")
    assert str(error).split()[-1] in line
    assert line.endswith("on Debian and Ubuntu apt install gcc python3-dev")


MESSAGES = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_line_without_memory_is_named_and_the_others_run(name):
    def fail():
        raise MESSAGES[name]

    checks = [Check("A", "large", fail), Check("A", "small", lambda: Outcome("PASS"))]
    large, small = do(checks)
    assert (large.name, large.outcome.status) == ("large", "OUT OF MEMORY")
    assert small.outcome.status == "PASS"


@pytest.mark.skipif(torch.cuda.is_available(), reason="where nothing can be made on a GPU")
def test_naming_the_checks_needs_no_memory_of_the_gpu():
    setting = Setting(torch.device("cuda"), small=False)
    modules = (lookups, reads, tables)
    assert len([check for module in modules for check in module.checks(setting)]) > 80


def test_clocks_are_of_the_gpu_that_is_checked(monkeypatch):
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 1980 MHz, 2619 MHz, 41, 300 W, 99 %\n")

    identities = {1: SimpleNamespace(uuid="11e0-42")}
    monkeypatch.setattr(machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: identities[device.index]
    )
    text = machine.clocks(GPU)
    assert text.startswith("driver 580.1, multiprocessors at 1980 MHz, memory at 2619 MHz")
    assert "--id=GPU-11e0-42" in asked[0]
    assert machine.clocks(torch.device("cpu")) == ""
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["output", "values"])
def test_compiled_code_that_differs_fails(name, monkeypatch):
    setting = Setting(torch.device("cpu"), small=True)
    true = machinery._tensors
    passes = []

    def differ(layer, x):
        found = true(layer, x)
        passes.append(found)
        if len(passes) == 2:
            found[name] = found[name] + 1e-4 * found[name].abs().max()
        return found

    with planning.prepared("torch", None):
        assert machinery._compiled(setting).status == "PASS"
        monkeypatch.setattr(machinery, "_tensors", differ)
        outcome = machinery._compiled(setting)
    assert outcome.status == "FAIL"
    assert outcome.note == f"{name}, compiled"
    assert outcome.error == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize("name", ["_graph_of_inference", "_graph_of_training"])
@pytest.mark.parametrize("forgets", [False, True])
def test_graphs_are_compared_with_calls(name, forgets, monkeypatch):
    """By a stand-in for a graph, which runs the call again, or forgets to."""

    def captured(run):
        for _ in range(3):
            out = run()

        def replay():
            again = None if forgets else run()
            if again is not None:
                out.copy_(again)

        return SimpleNamespace(replay=replay), out

    def adam(parameters, capturable):
        return Adam(parameters)  # capturable on a GPU alone

    Adam = torch.optim.Adam
    monkeypatch.setattr(machinery, "captured", captured)
    monkeypatch.setattr(torch.optim, "Adam", adam)
    with planning.prepared("torch", None):
        outcome = getattr(machinery, name).__wrapped__(Setting(torch.device("cpu"), small=True))
    assert outcome.status == ("FAIL" if forgets else "PASS"), outcome


def test_what_does_not_compile_ahead_is_left_to_its_check(monkeypatch, capsys):
    pytest.importorskip("triton")
    from pkm_triton.kernels import chip, launches

    asked = []

    def fail(found, threads):
        asked.append((len(found), threads))
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launches, "compile_launches", fail)
    monkeypatch.setattr(chip, "chip_of", lambda device: chip.CHIPS["sm_90"])
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    setting = Setting(torch.device("cpu"), small=True)
    checks = [check for check in lookups.checks(setting) if "gradients" in check.name][:1]
    ahead.compile_ahead(checks, torch.device("cpu"))
    assert (capsys.readouterr().out, asked) == ("", [])
    ahead.compile_ahead(checks, GPU)
    assert "at once" in capsys.readouterr().out
    ((count, threads),) = asked
    assert count >= 2
    assert 1 <= threads <= os.cpu_count()
