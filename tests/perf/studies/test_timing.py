import dataclasses

import pytest
import torch

import pkm_triton as pkm
from pkm_triton.perf.records.row_file import RowFile, read_rows
from pkm_triton.perf.studies import timing
from pkm_triton.perf.studies.models import build_model
from pkm_triton.perf.studies.records import TimedRow
from pkm_triton.perf.studies.timing import random_model, time_models

CALL = {"vocab_size": 256, "sequences": 2, "seconds": 0.001, "rounds": 3}


@pytest.fixture
def file(tmp_path):
    return RowFile(tmp_path / "timed.csv", TimedRow)


def test_every_architecture_is_timed_once_in_every_round(trial, file, monkeypatch):
    built = []

    def spy(each, *arguments):
        built.append(each.num_subkeys)
        return random_model(each, *arguments)

    monkeypatch.setattr(timing, "random_model", spy)
    other = dataclasses.replace(trial, num_subkeys=4)
    trials = [trial, other, dataclasses.replace(trial, seed=5, steps=9)]
    assert time_models(trials, file, **CALL, progress=lambda _: None) == 2
    assert built == [8, 4] * 3
    rows = read_rows(file.path, TimedRow)
    assert [row.trial for row in rows] == [trial.architecture(), other.architecture()]
    for row in rows:
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        assert row.tokens_per_s == pytest.approx(2 * 16 / row.median_ms * 1e3)
        assert (row.rounds, row.threads, row.vocab_size) == (3, 1, 256)
        size = sum(each.numel() for each in build_model(row.trial, 256).parameters())
        assert row.parameters == size
    assert time_models(trials, file, **CALL, progress=lambda _: None) == 0
    assert time_models(trials, file, **{**CALL, "sequences": 3}, progress=lambda _: None) == 2


def test_a_model_is_warm_when_it_is_timed_however_slow(trial, file, monkeypatch):
    calls = []
    call = timing._Inference.__call__
    monkeypatch.setattr(
        timing._Inference, "__call__", lambda *given: (calls.append(""), call(*given))[1]
    )
    time = timing.time_passes

    def spy(*given, **options):
        assert calls
        calls.clear()
        return time(*given, **options)

    monkeypatch.setattr(timing, "time_passes", spy)
    # So little time that the first call alone would be timed.
    assert time_models([trial], file, **{**CALL, "seconds": 1e-9}, progress=lambda _: None) == 1


@pytest.mark.parametrize("keys", ["product", "flat"])
def test_the_random_model_is_the_trials_and_computes_numbers(trial, keys):
    trial = dataclasses.replace(trial, keys=keys, norm="post")
    model = random_model(trial, 256, "cpu")
    expected = build_model(trial, 256)
    assert {n: p.shape for n, p in model.state_dict().items()} == {
        n: p.shape for n, p in expected.state_dict().items()
    }
    assert not model.training
    with torch.no_grad(), pkm.track_usage(model) as usages:
        logits = model(torch.randint(256, (8, 16)))
    assert logits.isfinite().all()
    assert logits.std() > 0.1
    (usage,) = usages.values()
    assert usage.usage() > 0.5  # reads are spread, as those of a trained model


def test_a_model_that_does_not_fit_is_said_before_anything_is_timed(trial, file):
    huge = dataclasses.replace(trial, num_subkeys=40_000, dim=4096)
    with pytest.raises(ValueError, match=r"needs 29.* GiB, but .* GiB are available"):
        time_models([trial, huge], file, **CALL)
    assert not file.path.exists()
