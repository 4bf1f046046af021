import dataclasses
import io
import math

import pytest
import torch

import pkm_triton as pkm
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.evaluation import evaluate
from pkm_triton.perf.studies.training import Trainer


def test_figures_equal_a_brute_force_count(trial, text):
    trainer = Trainer(trial, make_data(trial, text))
    trainer.run(output=io.StringIO())
    found = evaluate(trainer.model, trainer.data)
    assert trainer.model.training

    model = trainer.model.eval()
    memory = model.layers[1].ffn
    seen = []
    handle = memory.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    losses = []
    for inputs, targets in trainer.data.test_batches():
        with torch.no_grad():
            probabilities = model(inputs).double().softmax(-1)
        for row, target in zip(probabilities.flatten(0, 1), targets.flatten(), strict=True):
            losses.append(-math.log(row[target]))
    handle.remove()
    loss = sum(losses) / len(losses)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)
    assert math.isnan(found.recall)
    sums = [0.0] * 64
    for x in seen:
        weights, slots = memory.lookup(x)
        for slot, weight in zip(slots.flatten().tolist(), weights.flatten().tolist(), strict=True):
            sums[slot] += weight
    total = sum(sums)
    assert found.usage == sum(each > 0 for each in sums) / 64
    kl = math.log(64) + sum(z / total * math.log(z / total) for z in sums if z)
    assert found.kl == pytest.approx(kl, abs=1e-6)
    assert found.reads_per_slot == len(losses) * 2 * 4 / 64


def test_several_memories_are_averaged_and_none_is_nan(trial, text):
    both = dataclasses.replace(trial, memory_layers="1+2")
    trainer = Trainer(both, make_data(both, text))
    found = evaluate(trainer.model, trainer.data)
    with pkm.track_usage(trainer.model.eval()) as usages, torch.no_grad():
        for inputs, _ in trainer.data.test_batches():
            trainer.model(inputs)
    assert found.usage == sum(each.usage().item() for each in usages.values()) / 2
    none = dataclasses.replace(trial, memory_layers="")
    trainer = Trainer(none, make_data(none, text))
    found = evaluate(trainer.model, trainer.data)
    assert math.isnan(found.usage)
    assert math.isnan(found.reads_per_slot)


def test_a_loss_past_all_perplexities_is_a_figure_too(trial, text):
    trainer = Trainer(trial, make_data(trial, text))
    with torch.no_grad():
        trainer.model.output_norm.weight.mul_(1e5)
    found = evaluate(trainer.model, trainer.data)
    assert 710 < found.loss < math.inf
    assert found.perplexity == math.inf


def test_recall_counts_facts_of_which_both_symbols_are_right(fact_trial):
    data = make_data(fact_trial, None)
    facts = torch.cat([torch.cat([i, t[:, -1:]], dim=1) for i, t in data.test_batches()])

    class Knows(torch.nn.Module):
        """Knows the first symbol of 30 of the 40 facts, and the second of other 30."""

        def forward(self, inputs):
            logits = torch.zeros(*inputs.shape, 256)
            for row, sequence in enumerate(inputs):
                (number,) = (facts[:, :3] == sequence[:3]).all(-1).nonzero().flatten().tolist()
                first, second = facts[number, 3:].tolist()
                logits[row, 2, first if number < 30 else first ^ 1] = 5
                logits[row, 3, second if number >= 10 else second ^ 1] = 5
            return logits

    found = evaluate(Knows(), data)
    assert found.recall == 20 / 40
    assert math.isnan(found.bits_per_byte)
    right = -math.log(math.exp(5) / (math.exp(5) + 255))
    assert found.loss == pytest.approx(0.75 * right + 0.25 * (right + 5), rel=1e-5)
