import dataclasses
import math

import pytest
import torch

import pkm_triton as pkm
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.records.row_file import RowFile, read_rows
from pkm_triton.perf.studies import runner
from pkm_triton.perf.studies.data import FactData
from pkm_triton.perf.studies.evaluation import evaluate
from pkm_triton.perf.studies.presets import PRESETS
from pkm_triton.perf.studies.records import TrainedRow
from pkm_triton.perf.studies.runner import TRAINED_CSV, train_trials
from pkm_triton.perf.studies.training import Trainer
from pkm_triton.perf.studies.tuning import count_reads, tune


@pytest.fixture
def base():
    return PRESETS["tiny"].forgetting


def tuned(base, way, **changes):
    return dataclasses.replace(base, tuning=way, **changes)


def test_tuning_facts_are_others(base):
    before, task = FactData(base), FactData(base, tuning=True)
    keys = [
        {tuple(row) for inputs, _ in data.test_batches() for row in inputs[:, :3].tolist()}
        for data in (before, task)
    ]
    assert [len(each) for each in keys] == [40, 10]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("way", ["all", "adapter-2", "slots-8"])
def test_what_a_tuning_trains_and_what_it_leaves(base, way):
    trained = Trainer(base, FactData(base))
    trained.run()
    before = {name: each.clone() for name, each in trained.model.state_dict().items()}
    model = tune(trained, tuned(base, way), Ranks()).model
    changed = set()
    for name, each in model.state_dict().items():
        name = name.replace("parametrizations.weight.original", "weight")
        if name in before and not torch.equal(before[name], each):
            changed.add(name)
    assert changed == (set(before) if way == "all" else set())
    trains = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if way == "adapter-2":
        assert {name.rsplit(".", 1)[-1] for name in trains} == {"down", "up"}
        linear = [each for each in model.modules() if isinstance(each, torch.nn.Linear)]
        assert len(trains) == 2 * len(linear)
        assert all(each.abs().sum() > 0 for each in trains.values())
    if way == "slots-8":
        ((name, rows),) = trains.items()
        assert name.endswith("tuned.values")
        assert rows.shape == (8, base.dim)


def test_reads_are_counted_in_small_batches(base):
    trained = Trainer(base, FactData(base))
    ((layer, counts),) = count_reads(trained.model, trained.data, "cpu").items()
    assert isinstance(layer, pkm.ProductKeyMemory)
    assert counts.counts.sum() == 40 * 4 * base.heads * base.top_k
    assert counts.num_batches == 5  # of 8 facts, the trial's batch


def test_a_model_keeps_what_it_knew_where_few_slots_train(base):
    """The claim of the study, in seconds: facts that are known, and others to be learnt."""
    base = dataclasses.replace(
        base, facts=60, steps=150, batch=60, lr=1e-2, value_lr=4e-2, num_subkeys=64,
        tuning_facts=10, tuning_steps=200,
    )  # fmt: skip
    kept, learnt = {}, {}
    for way, lr in (("all", 1e-2), ("slots-128", 0.03)):
        trained = Trainer(base, FactData(base))
        trained.run()
        assert evaluate(trained.model, trained.data).recall > 0.9
        second = tune(trained, tuned(base, way, tuning_lr=lr), Ranks())
        learnt[way] = evaluate(second.model, second.data).recall
        kept[way] = evaluate(second.model, trained.data).recall
    assert learnt["slots-128"] > 0.3
    assert kept["slots-128"] > kept["all"] + 0.4


def test_rows_of_tunings_and_what_is_stopped_between_them(base, tmp_path, monkeypatch):
    trials = [base.before_tuning(), tuned(base, "all"), tuned(base, "slots-8")]
    whole, cut = (RowFile(tmp_path / name / TRAINED_CSV, TrainedRow) for name in ("whole", "cut"))
    for file in (whole, cut):
        file.path.parent.mkdir()
    assert train_trials(trials, whole, None) == 3
    first, everything, slots = read_rows(whole.path, TrainedRow)
    assert math.isnan(first.kept)
    assert first.tuned_parameters == 0
    assert everything.tuned_parameters == everything.parameters == first.parameters
    assert slots.tuned_parameters == 8 * base.dim
    assert 0 <= slots.kept <= 1
    assert (first.train_tokens, slots.train_tokens) == (6 * 8 * 4, 3 * 8 * 4)

    real, runs = runner.tune, []

    def stop(*arguments):
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(runner, "tune", stop)
    with pytest.raises(KeyboardInterrupt):
        train_trials(trials, cut, None)
    monkeypatch.setattr(runner, "tune", real)
    assert (cut.path.parent / "checkpoints").exists()
    assert train_trials(trials, cut, None) == 1
    assert not (cut.path.parent / "checkpoints").exists()
    for one, other in zip(whole.rows, read_rows(cut.path, TrainedRow), strict=True):
        assert (one.loss, one.train_loss, one.parameters) == (
            other.loss, other.train_loss, other.parameters
        )  # fmt: skip


@pytest.mark.parametrize("way", ["some", "slots", "slots-0", "slots-x", "all-3", "adapter--1"])
def test_impossible_tunings(base, way):
    with pytest.raises(ValueError, match=f"tuning: '{way}' is not allowed; give all, adapter-RA"):
        tuned(base, way)


def test_texts_are_not_tuned_for():
    with pytest.raises(ValueError, match="tuning: 'all' is unknown"):
        dataclasses.replace(PRESETS["tiny"].text, tuning="all", tuning_facts=3)
