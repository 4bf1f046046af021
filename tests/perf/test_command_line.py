import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.compiled import kernel_report
from pkm_triton.perf.measure import timing
from pkm_triton.perf.records.environment import device_name
from pkm_triton.perf.records.sweep_row import SCHEMA, read_rows
from pkm_triton.perf.report import plot
from pkm_triton.perf.sweep import command as sweep_command

TINY = ["--preset", "quick", "--num-subkeys", "8", "16", "--dim", "16", "--query-dim", "8"]
TINY += ["--tokens", "4", "--top-k", "1", "2", "3", "--heads", "2", "--seconds", "0.001"]
TINY += ["--device", "cpu"]


def test_ctrl_c_is_one_line_in_every_command(monkeypatch, capsys, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "read_rows", interrupt)
    assert main(["plot", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "pkm-perf: stopped\n"


def test_a_sweep_ends_in_a_csv_tables_and_pictures(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main(["sweep", *TINY, "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    for name in ("sweep.csv", "table.md", "comparison.md", "speed_against_size.png"):
        assert (folder / name).exists()
        assert str(folder / name) in printed
    for row in read_rows(folder / "sweep.csv"):
        assert row.ok or row.implementation == "product-key-memory", row.status
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]

    (folder / "table.md").unlink()
    assert main(["plot", str(folder)]) == 0
    assert (folder / "table.md").exists()
    assert main(["plot", str(folder / "sweep.csv"), "--output", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "time_by_part.svg").exists()

    capsys.readouterr()
    assert main(["compare", str(folder / "sweep.csv"), str(folder)]) == 0
    assert "geometric mean of B / A: 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query-dim", "7"], "query_dim: 7 is odd"),
        (["--top-k", "100"], "top_k: 100 is above the 64 slots"),
        (["--preset", "slow"], "preset: 'slow' is unknown"),
        (["--device", "tpu"], "device: 'tpu' is unknown; allowed: auto, cpu, cuda"),
        (["--keys", "round"], "keys: 'round' is unknown; allowed: product, flat"),
        (["--sparse-grad", "maybe"], "sparse-grad: 'maybe' is unknown; allowed: yes, no"),
        (["--seconds", "0"], "seconds: 0.0 is not allowed"),
        (["--memory-limit", "-2"], "memory-limit: "),
        (["--threads", "0"], "threads: 0 is too small"),
        (["--threads", "1000000"], "threads: 1000000 is not allowed; 1 to "),
        (["--seed", str(2**70)], f"seed: {2**70} is not allowed; 0 to 2^63 - 1"),
        (["--seed", "-1"], "seed: -1 is not allowed"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["sweep", *TINY, "--output", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pkm-perf: ")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


GRID = ["--grid-only", "--num-subkeys", "8", "16", "--top-k", "2", "3", "--dim", "16"]
GRID += ["--query-dim", "8", "--tokens", "4", "--heads", "2", "--seconds", "0.001"]
GRID += ["--device", "cpu"]


def test_a_grid_of_ones_own_is_measured_and_nothing_else(tmp_path, capsys):
    assert main(["sweep", *GRID, "--dry-run", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("pkm_triton product |C|=") == 4
    assert f"4 of 4 points are to be measured on {device_name('cpu')}, in about " in printed
    assert not (tmp_path / "out").exists()
    assert main(["sweep", *GRID, "--output", str(tmp_path / "out")]) == 0
    rows = read_rows(tmp_path / "out" / "sweep.csv")
    assert [(row.num_subkeys, row.top_k) for row in rows] == [(8, 2), (8, 3), (16, 2), (16, 3)]
    capsys.readouterr()
    assert main(["sweep", *GRID, "--dry-run", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("0 of 4 points are to be measured")


@pytest.mark.parametrize(
    ("seconds", "expected"), [("0.001", "1 to 1 seconds, "), ("30", "4.0 to 12.0 minutes, ")]
)
def test_a_dry_run_tells_short_times_in_seconds(seconds, expected, tmp_path, capsys):
    command = ["sweep", *GRID, "--dry-run", "--output", str(tmp_path / "out")]
    assert main([*command, "--seconds", seconds]) == 0
    assert f"in about {expected}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lazy", "timing: 'lazy' is unknown; allowed: eager, graph"),
        ("graph", "timing: 'graph' needs a GPU; allowed on a CPU: eager"),
    ],
)
def test_a_timing_that_cannot_be_is_refused(word, message, tmp_path, capsys):
    assert main(["sweep", *GRID, "--timing", word, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"pkm-perf: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_measured_nothing_fails(tmp_path, capsys):
    assert main(["sweep", *GRID, "--memory-limit", "1e-9", "--output", str(tmp_path)]) == 1
    assert "No point could be measured; the last one: skipped: predicted" in capsys.readouterr().err


def test_times_that_are_not_to_be_relied_on_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "_remark", lambda *_: "busy: other processes took 9 of 2 cores")
    assert main(["sweep", *GRID, "--output", str(tmp_path)]) == 0
    assert "Of 4 rows the times are not to be relied on (busy: other" in capsys.readouterr().err


def never(*_, **__):
    raise AssertionError("measured although it must not")


def test_an_unwritable_folder_is_said_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_command, "run_sweep", never)
    (tmp_path / "file").write_text("")
    assert main(["sweep", *TINY, "--output", str(tmp_path / "file" / "folder")]) == 2
    assert "output: cannot write in" in capsys.readouterr().err
    assert main(["plot", "--output", str(tmp_path / "file"), str(tmp_path / "none.csv")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_read_only_folder_is_said_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_command, "run_sweep", never)
    tmp_path.chmod(0o500)
    assert main(["sweep", *TINY, "--output", str(tmp_path)]) == 2
    assert "output: cannot write in" in capsys.readouterr().err


def test_a_csv_of_another_version_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep_command, "run_sweep", never)
    path = tmp_path / "sweep.csv"
    path.write_text(f"schema,tokens\n{SCHEMA + 1},4\n")
    assert main(["sweep", *TINY, "--output", str(tmp_path)]) == 2
    assert f"schema version {SCHEMA + 1}" in capsys.readouterr().err
    assert path.read_text() == f"schema,tokens\n{SCHEMA + 1},4\n"


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pkm_triton.perf.")]:
        if not name.endswith("__main__"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot"]) == 2
    assert "pip install 'pkm-triton[perf]'" in capsys.readouterr().err
    # What no extra has is installed by its own name.

    def fail(*_):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert main(["plot"]) == 2
    assert capsys.readouterr().err.endswith("install it with: pip install numpy\n")


def test_ctrl_c_leaves_a_valid_csv_and_says_how_to_go_on(tmp_path):
    tops = [str(top) for top in range(1, 60)]
    command = [sys.executable, "-m", "pkm_triton.perf", "sweep", *TINY, "--output", str(tmp_path)]
    command += ["--top-k", *tops, "--seconds", "0.1"]
    path = tmp_path / "sweep.csv"
    # Where the tests are run in the background of a shell, their children ignore the signal.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as running:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    rows = read_rows(path)
    assert rows
    assert f"Stopped; {len(rows)} rows are in {path}. The same command goes on" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "processes: 0 is too small"),
        (["--only", "gather sideways"], "only: 'gather sideways' is in no configuration's name"),
        (["--json", "/dev/null/report.json"], "json: cannot write in '/dev/null'"),
    ],
)
def test_a_mistake_in_the_kernel_report_is_found_before_anything_is_compiled(
    arguments, message, capsys
):
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_kernel_report_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(
        kernel_report, "report", lambda *_: [dict.fromkeys(kernel_report.COLUMNS, 1)]
    )
    path = tmp_path / "new" / "report.json"
    assert main(["kernels", "--json", str(path)]) == 0
    assert json.loads(path.read_text())[0]["registers"] == 1
    assert list(path.parent.iterdir()) == [path]
