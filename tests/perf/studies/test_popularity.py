import pytest
import torch

from pkm_triton.perf.measure.reads import read_shares, write_shares
from pkm_triton.perf.studies import popularity
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.training import Trainer
from pkm_triton.perf.studies.tuning import count_reads


def test_reads_are_counted_and_the_model_is_as_it_was(trial, text):
    trainer = Trainer(trial, make_data(trial, text))
    (memory,) = [m for m in trainer.model.modules() if hasattr(m, "keys_name")]
    trainer.model.train()
    counted = count_reads(trainer.model, trainer.data, "cpu")
    assert trainer.model.training
    tokens = sum(inputs.numel() for inputs, _ in trainer.data.test_batches())
    assert counted[memory].counts.sum() == tokens * trial.heads * trial.top_k


def test_shares_by_hand():
    counts = torch.tensor([0, 1, 5, 2, 0, 0, 2, 0])
    shares = dict(popularity.read_shares(counts))
    assert list(shares) == sorted(shares)
    assert shares[1 / 8] == pytest.approx(0.5)
    assert shares[2 / 8] == pytest.approx(0.7)
    assert shares[4 / 8] == shares[1.0] == pytest.approx(1.0)


def test_a_model_without_a_memory_has_no_reads_to_write(trial, text, tmp_path):
    without = trial.without_memory()
    trainer = Trainer(without, make_data(without, text))
    assert popularity.shares_of(trainer.model, trainer.data, "cpu") is None
    trainer = Trainer(trial, make_data(trial, text))
    found = popularity.shares_of(trainer.model, trainer.data, "cpu")
    write_shares(tmp_path / "reads.csv", found)
    parts, shares = read_shares(tmp_path / "reads.csv")
    assert parts[-1] == shares[-1] == 1
