import dataclasses
import errno
import math
import os

import pytest

from pkm_triton.perf.records.row_file import RowFile, read_rows
from pkm_triton.perf.studies import runner
from pkm_triton.perf.studies.records import TrainedRow
from pkm_triton.perf.studies.runner import TRAINED_CSV, train_trials
from pkm_triton.perf.studies.training import Trainer
from pkm_triton.perf.studies.trial import Trial, parse_settings, vocab_size_of


@pytest.fixture
def file(tmp_path):
    return RowFile(tmp_path / "study" / TRAINED_CSV, TrainedRow)


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    (tmp_path / "study").mkdir()


def sizes(trial, *numbers):
    return [dataclasses.replace(trial, num_subkeys=number) for number in numbers]


FIGURES = ("loss", "perplexity", "bits_per_byte", "usage", "kl", "train_loss")


def figures(row):
    return [getattr(row, name) for name in FIGURES]


def test_a_row_says_what_was_trained_on_what_and_how_it_ended(trial, text, file):
    assert train_trials([trial], file, text) == 1
    (row,) = read_rows(file.path, TrainedRow)
    assert row.trial == trial
    assert (row.text, row.text_size, row.text_sha256) == ("sentences", text.size, text.sha256)
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    assert 0 < row.usage <= 1
    assert row.train_tokens == 6 * 4 * 16
    assert row.memory_parameters > 64 * 16
    assert row.parameters > row.memory_parameters
    assert row.seconds > 0
    assert row.torch_version
    assert not list(file.path.parent.glob("checkpoints"))


def test_what_is_done_is_not_done_again_and_repeats_are_one(trial, text, file):
    trials = sizes(trial, 4, 8)
    assert train_trials([*trials, trials[0]], file, text) == 2
    before = file.path.read_text()
    again = RowFile(file.path, TrainedRow)
    assert train_trials(trials, again, text) == 0
    assert file.path.read_text() == before


def test_rows_of_other_studies_are_taken_over(trial, text, file, tmp_path, monkeypatch):
    train_trials([trial], file, text)
    (tmp_path / "other").mkdir()
    other = RowFile(tmp_path / "other" / TRAINED_CSV, TrainedRow)
    monkeypatch.setattr(runner, "train_trial", None)
    assert train_trials([trial], other, text, neighbours=[file.path]) == 0
    assert other.path.read_text() == file.path.read_text()


def test_a_trial_that_is_cut_off_loses_nothing(trial, text, file, tmp_path, monkeypatch):
    """The first trial keeps its row; the second goes on from its checkpoint, to the same bits."""
    whole = RowFile(tmp_path / "whole.csv", TrainedRow)
    trials = sizes(trial, 4, 8)
    train_trials(trials, whole, text)

    step = Trainer.train_step
    made = []

    def dies(self):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(self.step)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_trials(trials, file, text, checkpoint_seconds=0)
    assert len(read_rows(file.path, TrainedRow)) == 1
    made.clear()
    again = RowFile(file.path, TrainedRow)
    assert train_trials(trials, again, text, checkpoint_seconds=0) == 1
    assert made == [3, 4, 5]
    ours, theirs = (read_rows(each.path, TrainedRow) for each in (file, whole))
    assert [figures(row) for row in ours] == [figures(row) for row in theirs]


def test_studies_of_two_processes_in_one_folder(trial, text, file, monkeypatch):
    first, second = sizes(trial, 4, 8)
    step = Trainer.train_step

    def meanwhile(self):
        if self.trial == first and self.step == 0:  # the other ends before this one is first saved
            train_trials([second], RowFile(file.path, TrainedRow), text)
            assert not (file.path.parent / "checkpoints").exists()
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", meanwhile)
    train_trials([first], file, text, checkpoint_seconds=0)
    monkeypatch.undo()
    rows = read_rows(file.path, TrainedRow)
    assert {row.trial for row in rows} == {first, second}
    assert [path.name for path in file.path.parent.iterdir()] == [TRAINED_CSV]


def test_a_full_disk_loses_no_finished_trial(trial, text, file, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train_trials(sizes(trial, 4), file, text)
    before = file.path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train_trials(sizes(trial, 4, 8), file, text)
    assert file.path.read_bytes() == before
    assert len(file.rows) == 1


def test_wrong_data_are_said_before_anything_is_trained(trial, text, file, monkeypatch):
    monkeypatch.setattr(runner, "train_trial", None)
    bad = dataclasses.replace(trial, context=5000)
    with pytest.raises(ValueError, match="the context of 5000 needs"):
        train_trials([trial, bad], file, text)
    assert not file.path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_layers": "3"}, "memory_layers: layer 3 does not exist; allowed: 1 to 2"),
        ({"memory_layers": "0"}, "memory_layers: layer 0 does not exist"),
        ({"memory_layers": "2+2"}, "names a layer twice"),
        ({"memory_layers": "two"}, "memory_layers: 'two' is not allowed"),
        ({"top_k": 65}, "num_subkeys: 8 makes 64 slots; at least top_k \\(65\\)"),
        ({"query_dim": 7}, "query_dim: 7 is odd"),
        ({"attention_heads": 3}, "dim: 16 is no multiple of the 3 attention_heads"),
        ({"steps": 0}, "steps: 0 is too small; at least 1"),
        ({"lr": 0.0}, "lr: 0.0 is not allowed"),
        ({"clip": math.nan}, "clip: nan is not allowed"),
        ({"keys": "round"}, "keys: 'round' is unknown; allowed: product, flat"),
        ({"query_norm": "x"}, "query_norm: 'x' is unknown"),
        ({"norm": "x"}, "norm: 'x' is unknown"),
        ({"task": "x"}, "task: 'x' is unknown"),
        ({"tokens": "x"}, "tokens: 'x' is unknown"),
        ({"facts": 0, "task": "facts"}, "facts: 0 is too small"),
    ],
)
def test_impossible_trials(trial, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trial, **changes)


def test_trials_have_names_of_their_own(trial):
    names = {each.name for each in (*sizes(trial, 4, 8), dataclasses.replace(trial, seed=1))}
    assert len(names) == 3


def test_the_architecture_leaves_out_what_speed_does_not_depend_on(trial):
    changes = {"seed": 3, "steps": 9, "lr": 1.0, "text": "b", "text_sha256": "x", "clip": 9.0}
    assert dataclasses.replace(trial, **changes).architecture() == trial.architecture()
    for changes in ({"top_k": 3}, {"keys": "flat"}, {"layers": 3}, {"context": 8}):
        assert dataclasses.replace(trial, **changes).architecture() != trial.architecture()


def test_settings_are_of_their_fields_types():
    settings = parse_settings(["steps=5", "lr=1e-3", "sparse_grad=yes", "tokens=bytes"])
    assert settings == {"steps": 5, "lr": 1e-3, "sparse_grad": True, "tokens": "bytes"}
    assert isinstance(Trial(**settings), Trial)
    assert (vocab_size_of("bytes"), vocab_size_of("bpe1024")) == (256, 1024)


@pytest.mark.parametrize("word", ["steps", "step=5", "steps=many", "sparse_grad=1", "=3"])
def test_settings_that_are_none(word):
    with pytest.raises(ValueError, match="set: "):
        parse_settings([word])


def test_a_longer_trial_goes_on_from_the_shorter_to_the_same_figures(
    trial, text, file, tmp_path, monkeypatch
):
    chain = [dataclasses.replace(trial, steps=steps) for steps in (2, 4, 6)]
    alone = RowFile(tmp_path / "alone.csv", TrainedRow)
    for each in chain:
        train_trials([each], alone, text)
    step, made = Trainer.train_step, []
    monkeypatch.setattr(Trainer, "train_step", lambda self: (made.append(1), step(self))[1])
    assert train_trials(chain, file, text) == 3
    assert len(made) == 6
    assert [figures(row) for row in file.rows] == [figures(row) for row in alone.rows]
    assert not list(file.path.parent.glob("checkpoints"))


def test_a_chain_that_is_cut_off_between_two_trials_makes_no_step_twice(
    trial, text, file, monkeypatch
):
    chain = [dataclasses.replace(trial, steps=steps) for steps in (2, 6)]
    step, made = Trainer.train_step, []

    def dies(self):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_trials(chain, file, text)
    made.extend([1])
    assert train_trials(chain, RowFile(file.path, TrainedRow), text) == 1
    assert len(made) == 3 + 4
