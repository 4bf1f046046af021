"""Trainings whose tables lie over ranks; a rank that is killed, and one that hangs."""

import dataclasses
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_two_ranks

import pkm_triton as pkm
from pkm_triton.perf.__main__ import main
from pkm_triton.perf.records.row_file import read_rows
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.evaluation import evaluate
from pkm_triton.perf.studies.models import build_model
from pkm_triton.perf.studies.presets import PRESETS
from pkm_triton.perf.studies.records import TrainedRow
from pkm_triton.perf.studies.training import Trainer

LAYOUTS = ("columns", "rows")
RANK = """
import dataclasses, io, pickle
from pathlib import Path
import pkm_triton as pkm
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.evaluation import evaluate
from pkm_triton.perf.records.row_file import RowFile
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.studies.records import TrainedRow
from pkm_triton.perf.studies.runner import train_trials
from pkm_triton.perf.studies.training import Trainer

torch.set_default_dtype(torch.float64)
trials, text, facts = pickle.loads(Path(folder, "trials").read_bytes())

def trainer_of(trial, layout):
    return Trainer(trial, make_data(trial, text), ranks=Ranks(rank, 2, layout))

for number, trial in enumerate(trials):
    for layout, other in (("columns", "rows"), ("rows", "columns")):
        name = f"{folder}/{layout}-{number}"
        trainer = trainer_of(trial, layout)
        pkm.save_with_memory(trainer.model, f"{name}.start.pt")
        told = io.StringIO()
        loss = trainer.run(output=told, clock=lambda: 0.0)
        pkm.save_with_memory(trainer.model, f"{name}.end.pt")
        figures = evaluate(trainer.model, trainer.data)
        torch.save((loss, figures, told.getvalue()), f"{name}.{rank}")

        # Stopped, with losses that count noted, and taken up in the other layout.
        path = Path(f"{name}.checkpoint.pt")
        first = trainer_of(trial, layout)
        pkm.load_with_memory(first.model, f"{name}.start.pt")
        first.run(path, stop_at=trial.steps - 1, output=io.StringIO())
        second = trainer_of(trial, other)
        assert abs(second.run(path, output=io.StringIO()) - loss) < 1e-9 * loss
        assert second.step == trial.steps
        pkm.save_with_memory(second.model, f"{name}.resumed.pt")

ranks = Ranks(rank, 2, "rows")
(part,) = Path(f"{name}.checkpoint").glob("*/__1_0.distcp")
part.write_bytes(b"")
try:
    Trainer(trial, make_data(trial, text), ranks=ranks).run(path)
except ValueError as error:
    assert "checkpoint' is broken: rank" in str(error).replace("/000001", ""), error
else:
    raise AssertionError
file = RowFile(Path(folder, "trained.csv"), TrainedRow)
again = dataclasses.replace(trials[0], steps=3)  # from whose checkpoint the other goes on
assert train_trials([again, trials[0]], file, text, ranks=ranks) == 2
try:
    train_trials([dataclasses.replace(facts, tuning="slots-2")], file, None, ranks=ranks)
except ValueError as error:
    assert "shard: 'rows' is not possible with tuning 'slots-2'" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_tables_over_ranks_give_the_one_rank_result(trial, text, tmp_path, double_precision):
    """In float64 within 1e-9, of sums in another order; resumed in another layout alike."""
    trials = [dataclasses.replace(trial, steps=20, sparse_grad=sparse) for sparse in (False, True)]
    (tmp_path / "trials").write_bytes(pickle.dumps((trials, text, PRESETS["tiny"].forgetting)))
    run_two_ranks(RANK, tmp_path)
    for number, each in enumerate(trials):
        for layout in LAYOUTS:
            name = f"{layout}-{number}"
            data = make_data(each, text)

            def loaded(which, each=each, name=name, data=data):
                model = build_model(each, data.vocab_size)
                return pkm.load_with_memory(model, tmp_path / f"{name}.{which}.pt")

            alone = Trainer(each, data, model=loaded("start"))
            told = io.StringIO()
            loss = alone.run(output=told, clock=lambda: 0.0)
            figures = evaluate(alone.model, data)
            for rank in range(2):
                record = torch.load(tmp_path / f"{name}.{rank}", weights_only=False)
                their_loss, theirs, line = record
                assert line == ("" if rank else told.getvalue())
                assert their_loss == pytest.approx(loss, rel=1e-9)
                expected = pytest.approx(dataclasses.asdict(figures), rel=1e-9, nan_ok=True)
                assert dataclasses.asdict(theirs) == expected
            for which in ("end", "resumed"):
                theirs = loaded(which).state_dict()
                for key, tensor in alone.model.state_dict().items():
                    torch.testing.assert_close(theirs[key], tensor, msg=key, atol=1e-8, rtol=1e-6)
    first, last = read_rows(tmp_path / "trained.csv", TrainedRow)
    assert (first.steps, last.steps) == (3, 20)
    _, figures, _ = torch.load(tmp_path / "rows-0.0", weights_only=False)
    assert last.perplexity == pytest.approx(figures.perplexity, rel=1e-9)
    assert not (tmp_path / "checkpoints").exists()
    start = [loaded_values(tmp_path / f"{layout}-0.start.pt") for layout in LAYOUTS]
    assert torch.equal(*start)  # drawn alike in either layout


def loaded_values(path):
    """The table in a file."""
    return torch.load(path)["state"]["layers.1.ffn.values"]


def words(folder):
    """The command, but for where it writes."""
    return [
        *["train", "--preset", "tiny", "--threads", "1", "--text", str(folder / "text")],
        *["--device", "cpu", "--shard", "columns", "--set", "steps=60", "sparse_grad=yes"],
    ]


def train(folder, *more):
    """It on two ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "-m", "pkm_triton.perf", *words(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def worker(launcher, rank):
    """The process of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            variables = path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == launcher.pid and b"RANK=%d" % rank in variables:
            return int(path.name)
    raise LookupError(rank)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="needs Linux's /proc")
def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("\n\n".join(f"Paragraph {i}, {i * i}." for i in range(400)))
    out = tmp_path / "out"
    more = ["--output", str(out), "--checkpoint-seconds", "0.3"]
    launcher = train(tmp_path, *more)
    while not list(out.glob("checkpoint/*/.metadata")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    os.kill(worker(launcher, 1), signal.SIGKILL)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in error
    assert not (out / "model.pt").exists()

    again = train(tmp_path, *more)
    printed, error = again.communicate(timeout=100)
    assert again.returncode == 0, error
    assert "step 60/60" in error
    # One rank, in this process.
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert main([*words(tmp_path), "--output", str(tmp_path / "alone")]) == 0
    expected = capsys.readouterr().out

    def loss(text):
        return float(text.split("test set: loss ")[1].split(",")[0])

    # Of float32 after 60 steps.
    assert loss(printed) == pytest.approx(loss(expected), rel=1e-3)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "model.pt", "reads.csv"]


HANGS = """
import time, torch.distributed as dist
from pkm_triton.perf.measure import ranks
ranks.GRACE = 1.0
with ranks.ranks_of_torchrun("cpu", timeout=3) as group:
    group.wait()
    if group.rank == 1:
        time.sleep(9)
    else:
        group.wait()
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path):
    (tmp_path / "script.py").write_text(HANGS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert "ConnectionError: rank 0: no answer from rank 1 of 2; the same command" in done.stderr


@pytest.mark.parametrize("command", ["train", "study memory-size"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--shard columns", "shard: 'columns' needs ranks: torchrun"),
        ("--shard diagonal", "shard: 'diagonal' is unknown; allowed: columns, rows"),
        ("--timeout 0", "timeout: 0.0 is not allowed; give seconds above 0"),
    ],
)
def test_what_is_wrong_is_said(command, wrong, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = [*command.split(), "--preset", "tiny", "--device", "cpu", *wrong.split()]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
