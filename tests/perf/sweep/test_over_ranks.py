"""A sweep whose values lie over torchrun's processes."""

import os
import subprocess
import sys

import pytest
from torch import distributed

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.records.sweep_row import read_rows

SIZES = ["--grid-only", "--num-subkeys", "8", "16", "--top-k", "4", "--heads", "2", "--dim", "16"]
SIZES += ["--query-dim", "8", "--tokens", "12", "--query-norm", "layer", "--threads", "1"]
SIZES += ["--pass", "forward", "forward+backward", "--sparse-grad", "yes", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_measure_together_and_go_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "pkm_triton.perf", "sweep", *SIZES, "--seconds", "0.01"]
    command += ["--ranks", "1", "2", "--layout", "columns", "rows", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for measured in (12, 0):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{measured} points measured, {12 - measured} were there") == 1
    rows = read_rows(tmp_path / "sweep.csv")
    assert {(row.ranks, row.layout) for row in rows} == {
        (1, "none"), (2, "columns"), (2, "rows"),
    }  # fmt: skip
    assert all(row.ok for row in rows)
    # By hand: 12 tokens of 8 reads and 16 columns of float32, from one rank to the other.
    pairs = 12 * 8 * 8
    for row in rows:
        width = {"none": 0, "columns": 8, "rows": 16}[row.layout]
        sums = 12 * width * 4
        backward = sums + pairs // 2 if row.backward else 0
        assert row.sent_bytes == (pairs + sums + backward if row.ranks > 1 else 0)
        assert row.counted_bytes == row.sent_bytes
        assert row.tokens_per_s == pytest.approx(row.ranks * 12 / row.median_ms * 1e3)
    by_ranks = {row.ranks: row for row in rows if row.num_subkeys == 16}
    # The keys and the query network, and half of 256 · 16 values.
    assert by_ranks[1].parameter_bytes - by_ranks[2].parameter_bytes == 4 * 256 * 16 / 2
    assert (tmp_path / "speed_over_ranks.png").exists()


def test_more_ranks_than_processes_are_refused(tmp_path, capsys):
    assert main(["sweep", *SIZES, "--ranks", "1", "2", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "ranks: 2 need as many processes, but there are 1: torchrun --nproc-per-node 2" in said
    assert main(["sweep", *SIZES, "--ranks", "0", "--output", str(tmp_path)]) == 2
    assert "ranks: 0 is too small" in capsys.readouterr().err
    assert not (tmp_path / "sweep.csv").exists()
