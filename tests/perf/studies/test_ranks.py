import dataclasses
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from ranks import run_two_ranks

from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.training import Trainer

RANK = """
import io, pickle
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.studies.training import Trainer
from pathlib import Path

torch.set_default_dtype(torch.float64)
trials, text = pickle.loads(Path(folder, "trials").read_bytes())
ranks = Ranks(rank, 2)
for number, trial in enumerate(trials):
    trainer = Trainer(trial, make_data(trial, text), ranks=ranks)
    loss = trainer.run(Path(folder, f"{number}.checkpoint"), checkpoint_seconds=0, output=io.StringIO())
    torch.save((loss, trainer.model.state_dict()), f"{folder}/{number}.{rank}")
    assert trainer.step == trial.steps
    assert ranks.mean(torch.tensor(rank)) == 0.5 and ranks.any(rank == 0) and not ranks.any(rank == 1)
"""  # noqa: E501


@pytest.mark.slow
def test_two_ranks_give_the_one_rank_result(trial, text, tmp_path, double_precision):
    trials = [dataclasses.replace(trial, steps=5, sparse_grad=sparse) for sparse in (False, True)]
    (tmp_path / "trials").write_bytes(pickle.dumps((trials, text)))
    run_two_ranks(RANK, tmp_path)
    for number, each in enumerate(trials):
        alone = Trainer(each, make_data(each, text))
        loss = alone.run(output=io.StringIO())
        for rank in range(2):
            shared_loss, state = torch.load(tmp_path / f"{number}.{rank}")
            assert shared_loss == pytest.approx(loss, rel=1e-9)
            for name, tensor in alone.model.state_dict().items():
                torch.testing.assert_close(state[name], tensor, msg=name, atol=1e-8, rtol=1e-6)


@pytest.mark.slow
def test_torchrun_trains_and_saves_one_model(tmp_path):
    (tmp_path / "text").write_text("\n\n".join(f"Paragraph {i}, {i * i}." for i in range(400)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "pkm_triton.perf", "train", "--preset", "tiny", "--threads", "1"]
    command += ["--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test set: loss") == 1
    assert done.stderr.count("step 6/6") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint.pt",
        "model.pt",
        "reads.csv",
    ]


THREADS = """
import os
from pathlib import Path
import torch
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.presets import PRESETS
from pkm_triton.perf.measure.ranks import ranks_of_torchrun
from pkm_triton.perf.studies.training import Trainer

def train():
    with ranks_of_torchrun("cpu") as ranks:
        trial = PRESETS["tiny"].facts
        Trainer(trial, make_data(trial, None), ranks=ranks).train_step()
        ranks.wait()

train()
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in names), names
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_no_thread_of_the_process_group_is_left(tmp_path):
    # One that is left may abort the process while the interpreter ends.
    (tmp_path / "script.py").write_text(THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_a_batch_that_cannot_be_shared(trial, text):
    with pytest.raises(ValueError, match="batch: 4 is no multiple of the 3 ranks"):
        Trainer(trial, make_data(trial, text), ranks=Ranks(0, 3))
