"""Every example runs, in tiny form, and is short."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {
    "accelerate_loop.py": ("accelerate", ["--steps", "8"]),
    "convert_checkpoint.py": ("torch", []),
    "data_parallel.py": ("torch.distributed", ["--steps", "8"]),
    "export_model.py": ("torch", ["--output", "model.pt2"]),
    "finetune_llama.py": ("accelerate", ["--steps", "3", "--output", "finetuned"]),
    "lightning_module.py": ("lightning", ["--steps", "8"]),
    "lora_beside_memories.py": ("peft", ["--steps", "3", "--output", "adapter"]),
    "sharded_memory.py": ("torch.distributed", ["--steps", "8"]),
    "sharded_with_sparse_values.py": ("torch.distributed", ["--steps", "8"]),
    "sparse_autoencoder.py": ("torch", ["--steps", "8", "--rounds", "1", "--latents", "512"]),
}


def test_there_is_a_run_of_each_and_each_is_short():
    found = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(found) == set(ARGUMENTS)
    assert max(found.values()) <= 80


def run(name, arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # they are of what the examples show together
@pytest.mark.parametrize("name", ARGUMENTS)
def test_runs(name, tmp_path, monkeypatch, capsys):
    needed, arguments = ARGUMENTS[name]
    pytest.importorskip(needed)
    if needed in ("accelerate", "peft"):
        pytest.importorskip("transformers")
    if needed == "torch.distributed":
        if not torch.distributed.is_gloo_available():
            pytest.skip("needs gloo")
        # As torchrun does, with one rank.
        for variable in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.setenv(variable, "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    run(name, arguments, tmp_path, monkeypatch)
    told = capsys.readouterr().out
    assert re.search(r"loss \d|gives what the model gives|written back", told)
    if found := re.search(r"loss ([\d.]+) to ([\d.]+)", told):
        assert float(found[2]) < float(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_a_memory_over_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "sharded_memory.py"), "--steps", "40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)", done.stdout).groups())
    assert last < 0.5 * first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "saved"]


TORCHRUN = [name for name, (needed, _) in ARGUMENTS.items() if needed == "torch.distributed"]


@pytest.mark.parametrize("name", TORCHRUN)
def test_without_torchrun_one_sentence_says_so(name, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=f"^needs torchrun: torchrun .* examples/{name}$"):
        run(name, [], tmp_path, monkeypatch)


def test_a_text_that_is_too_short(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    (tmp_path / "text").write_text("short")
    with pytest.raises(SystemExit):
        run("finetune_llama.py", ["--text", "text"], tmp_path, monkeypatch)
    assert "--text: text has 5 tokens; more than 64 are needed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ahead_of_time(tmp_path, monkeypatch, capsys):
    run("export_model.py", ["--output", "model.pt2", "--compile"], tmp_path, monkeypatch)
    assert "gives what the model gives" in capsys.readouterr().out
