import pytest

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.studies import train_command
from pkm_triton.perf.studies.training import Trainer

TRAIN = ["train", "--preset", "tiny", "--device", "cpu", "--threads", "1", "--text"]


@pytest.fixture
def source(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\n".join(text.documents))
    return str(path)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("saved", [False, True])
def test_ctrl_c_says_whether_there_is_a_checkpoint(source, tmp_path, capsys, monkeypatch, saved):
    folder = tmp_path / "out"
    save = Trainer.save
    if saved:
        monkeypatch.setattr(Trainer, "save", lambda *given: (save(*given), interrupt()))
    else:
        monkeypatch.setattr(Trainer, "train_step", interrupt)
    command = [*TRAIN, source, "--output", str(folder), "--checkpoint-seconds", "0"]
    assert main(command) == 130
    error = capsys.readouterr().err
    path = folder / train_command.CHECKPOINT
    assert path.exists() == saved
    expected = f"goes on from {path}." if saved else "starts anew: there is no checkpoint."
    assert f"Stopped; the same command {expected}" in error


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--checkpoint-seconds", "-3"], "checkpoint-seconds: -3.0 is not allowed; at least 0"),
        (["--checkpoint-seconds", "nan"], "checkpoint-seconds: nan is not allowed"),
        (["--set", "text=novel"], "set: 'text=novel' is not allowed; give FIELD=VALUE, of task, t"),
        (
            ["--set", "task=facts", "facts=9", "tuning_facts=9", "tuning=all"],
            "tuning: 'all' is what pkm-perf study forgetting does",
        ),
    ],
)
def test_what_a_training_would_pass_over_is_refused(source, tmp_path, capsys, changed, message):
    assert main([*TRAIN, source, "--output", str(tmp_path / "out"), *changed]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverged_says_so(source, tmp_path, capsys):
    command = [*TRAIN, source, "--output", str(tmp_path / "out"), "--set", "steps=12"]
    assert main([*command, "lr=1e6", "value_lr=1e6"]) == 0
    assert "test set: loss nan, usage" in capsys.readouterr().out


def test_a_finished_training_is_extended_by_asking_for_more_steps(source, tmp_path, capsys):
    command = [*TRAIN, source, "--output", str(tmp_path / "out"), "--set"]
    assert main([*command, "steps=4"]) == 0
    assert main([*command, "steps=6"]) == 0
    assert "step 6/6" in capsys.readouterr().err
    assert main([*command, "steps=5"]) == 2
    assert "steps: 5 is less than the 6" in capsys.readouterr().err
    assert main([*command, "steps=8", "lr=0.5"]) == 2
    assert "another configuration: steps is 6 there and 8 here, lr" in capsys.readouterr().err
