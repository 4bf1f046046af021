import copy
import dataclasses
import errno
import io
import math
import os
import re

import pytest
import torch
import torch.nn.functional as F

import pkm_triton as pkm
from pkm_triton.perf.studies import training
from pkm_triton.perf.studies.data import make_data
from pkm_triton.perf.studies.models import memory_maker
from pkm_triton.perf.studies.training import Progress, Trainer, learning_rate_factor
from pkm_triton.perf.studies.trial import Trial


@pytest.fixture
def make_trainer(trial, text):
    def make(**changes):
        changed = dataclasses.replace(trial, **changes)
        return Trainer(changed, make_data(changed, text))

    return make


def test_the_schedule_is_that_of_vaswani_et_al():
    d_model, warmup = 512, 4000
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        published = d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
        peak = d_model**-0.5 * warmup**-0.5
        assert learning_rate_factor(step, warmup) == pytest.approx(published / peak)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_steps_equal_steps_written_by_hand(make_trainer, sparse):
    """Adam with the paper's betas and two rates, warm-up, and clipping of all gradients at once."""
    trainer = make_trainer(sparse_grad=sparse, clip=0.3, warmup=4)
    trainer.model.double()
    model = copy.deepcopy(trainer.model)
    for layer in model.layers:
        if isinstance(layer.ffn, pkm.ProductKeyMemory):
            layer.ffn.sparse_grad = False
    names = dict(model.named_parameters())
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in names.items()}
    clipped = 0
    for step in range(1, 4):
        inputs, targets = trainer.data.batch(step - 1)
        logits = model.train()(inputs)
        loss = F.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))
        assert trainer.train_step().item() == pytest.approx(loss.item(), rel=1e-12)
        grads = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        clipped += norm > 0.3
        for name, parameter in names.items():
            grad = grads[name] * min(1.0, 0.3 / (norm + 1e-6))
            lr = (8e-3 if name.endswith("values") else 2e-3) * step / 4
            mean, square = moments[name]
            rows = slice(None)
            if sparse and name.endswith("values"):  # only what was read
                rows = grad.abs().sum(-1) > 0
            mean[rows] = 0.9 * mean[rows] + 0.1 * grad[rows]
            square[rows] = 0.98 * square[rows] + 0.02 * grad[rows] ** 2
            corrected = mean[rows] / (1 - 0.9**step)
            spread = (square[rows] / (1 - 0.98**step)).sqrt()
            eps = 1e-8 / math.sqrt(1 - 0.98**step) if sparse and name.endswith("values") else 1e-8
            with torch.no_grad():
                parameter[rows] -= lr * corrected / (spread + eps)
    assert clipped > 0
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, names[name], msg=name, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_loss_falls_on_a_repeated_batch(make_trainer, sparse, monkeypatch):
    trainer = make_trainer(steps=60, warmup=60, sparse_grad=sparse)
    first = trainer.data.batch(0)
    monkeypatch.setattr(trainer.data, "batch", lambda *_: first)
    losses = [trainer.train_step().item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(make_trainer, tmp_path, sparse):
    whole = make_trainer(steps=12, sparse_grad=sparse)
    train_loss = whole.run(output=io.StringIO())
    cut = make_trainer(steps=12, sparse_grad=sparse)
    path = tmp_path / "checkpoint.pt"
    cut.run(path, stop_at=5, output=io.StringIO())
    torch.manual_seed(99)
    resumed = make_trainer(steps=12, sparse_grad=sparse)
    torch.rand(3)
    assert resumed.run(path, output=io.StringIO()) == train_loss
    assert resumed.step == 12
    assert resumed.seconds > cut.seconds
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert torch.equal(torch.get_rng_state(), _random_state_of(whole, tmp_path))


def _random_state_of(trainer, folder):
    trainer.save(folder / "other.pt")
    return torch.load(folder / "other.pt")["random"]


def test_checkpoints_are_written_every_so_often_and_go_on_anywhere(make_trainer, tmp_path):
    path = tmp_path / "checkpoint.pt"
    ticks = iter(range(1000))
    trainer = make_trainer(steps=9)
    seen = []
    save = trainer.save
    trainer.save = lambda where: (seen.append(trainer.step), save(where))
    trainer.run(path, checkpoint_seconds=10, output=io.StringIO(), clock=lambda: next(ticks))
    assert len(seen) >= 2
    assert seen[-1] < 9  # a finished run writes none: the row takes its place
    expected = {name: each.clone() for name, each in trainer.model.state_dict().items()}
    again = make_trainer(steps=9)
    again.run(path, output=io.StringIO())
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_another_configuration_is_refused(make_trainer, tmp_path):
    path = tmp_path / "checkpoint.pt"
    make_trainer().save(path)
    other = make_trainer(num_subkeys=4, lr=0.1)
    before = {name: each.clone() for name, each in other.model.state_dict().items()}
    message = "another configuration: num_subkeys is 8 there and 4 here, lr is 0.002 there and 0.1"
    with pytest.raises(ValueError, match=message):
        other.run(path)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of pkm_triton training checkpoint"):
        other.run(path)


FIELDS = [field.name for field in dataclasses.fields(Trial) if field.name != "steps"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_checkpoint_that_differs_in_one_field_is_refused(make_trainer, tmp_path, name):
    path = tmp_path / "checkpoint.pt"
    trainer = make_trainer()
    ours = getattr(trainer.trial, name)
    theirs = ours + "x" if isinstance(ours, str) else not ours if ours in (0, 1) else ours * 2
    with pytest.MonkeyPatch.context() as patch:
        fields = {**dataclasses.asdict(trainer.trial), name: theirs}
        patch.setattr(training.dataclasses, "asdict", lambda _: fields)
        trainer.save(path)
    with pytest.raises(ValueError, match=f"another configuration: {name} is .* there and"):
        trainer.load(path)


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(make_trainer, tmp_path):
    path = tmp_path / "checkpoint.pt"
    short = make_trainer(steps=6)
    short.run(path, output=io.StringIO())
    short.save(path)
    longer, whole = make_trainer(steps=10), make_trainer(steps=10)
    longer.run(path, output=io.StringIO())
    whole.run(output=io.StringIO())
    assert longer.step == 10
    for (name, ours), theirs in zip(
        longer.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match="steps: 4 is less than the 6 that"):
        make_trainer(steps=4).run(path)


@pytest.mark.parametrize("longer", [20, 21])
def test_an_extended_run_has_the_training_loss_of_one_in_one_go(make_trainer, tmp_path, longer):
    path = tmp_path / "checkpoint.pt"
    short = make_trainer(steps=19)
    short.run(output=io.StringIO())
    short.save(path)
    goes_on = make_trainer(steps=longer).run(path, output=io.StringIO())
    assert goes_on == make_trainer(steps=longer).run(output=io.StringIO())


def test_a_training_loss_that_was_not_kept_is_not_known(make_trainer, tmp_path):
    path = tmp_path / "checkpoint.pt"
    make_trainer(steps=60).run(path, stop_at=19, output=io.StringIO())
    shorter = make_trainer(steps=20)
    assert math.isnan(shorter.run(path, output=io.StringIO()))
    assert shorter.step == 20


@pytest.mark.parametrize("step", [-1, 7, 2.0, True, None])
def test_a_checkpoint_with_an_impossible_step_is_refused(make_trainer, tmp_path, step):
    path = tmp_path / "checkpoint.pt"
    trainer = make_trainer(steps=6)
    trainer.step = step
    trainer.save(path)
    with pytest.raises(ValueError, match=f"is broken: its step is {step}"):
        make_trainer(steps=6).load(path)


@pytest.mark.parametrize(("steps", "counted"), [(20, 2), (30, 3), (6, 1)])
def test_the_training_loss_is_of_the_last_tenth_of_the_steps(make_trainer, steps, counted):
    trainer = make_trainer(steps=steps)
    losses = []
    step = trainer.train_step
    trainer.train_step = lambda: (losses.append(step()), losses[-1])[1]
    found = trainer.run(output=io.StringIO())
    assert found == torch.stack(losses[-counted:]).mean().item()


def test_a_full_disk_leaves_the_last_checkpoint(make_trainer, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    trainer = make_trainer()
    trainer.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.run(path, checkpoint_seconds=0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_progress_line_has_true_figures(make_trainer, monkeypatch):
    trainer = make_trainer(steps=4)
    output = io.StringIO()
    ticks = iter(range(100))
    monkeypatch.setattr(Progress, "SECONDS", 1e9)
    usage = pkm.MemoryUsage(64)
    memory = trainer.model.layers[1].ffn
    lookup = memory.lookup

    def spy(x, mask=None):
        weights, slots = lookup(x, mask)
        usage.update(slots, weights.detach())
        return weights, slots

    memory.lookup = spy
    losses = []
    step = trainer.train_step
    trainer.train_step = lambda: (losses.append(step()), losses[-1])[1]
    trainer.run(output=output, clock=lambda: next(ticks))
    (line,) = output.getvalue().splitlines()
    loss = sum(each.item() for each in losses) / 4
    assert "step 4/4" in line
    assert f"loss {loss:.4f}" in line
    assert f"{loss / math.log(2):.4f} bits/byte" in line
    assert f"usage {usage.usage().item():.1%}, KL {usage.kl().item():.2f}" in line
    assert "tokens/s" in line
    assert memory.usages == []


def test_bits_per_byte_are_of_the_bytes_of_all_steps_of_a_line(make_trainer):
    trainer = make_trainer(steps=3)
    data, output = trainer.data, io.StringIO()
    data._lengths = torch.arange(256)  # as of tokens of many lengths
    trainer.run(output=output)
    found = re.search(r"loss ([0-9.]+)  ([0-9.]+) bits/byte", output.getvalue())
    loss, bits = float(found[1]), float(found[2])
    targets = [data.batch(step)[1] for step in range(3)]
    num_bytes = sum(int(each.sum()) for each in targets)
    tokens = sum(each.numel() for each in targets)
    assert bits == pytest.approx(loss * tokens / num_bytes / math.log(2), abs=1e-4)


def test_facts_train_too(fact_trial):
    trainer = Trainer(fact_trial, make_data(fact_trial, None))
    output = io.StringIO()
    trainer.run(output=output)
    assert "bits/byte" not in output.getvalue()
    assert trainer.step == fact_trial.steps


@pytest.mark.parametrize("keys", ["product", "flat"])
@pytest.mark.parametrize("fixed", [False, True])
def test_fixed_keys_stay_where_they_started(trial, text, keys, fixed):
    trial = dataclasses.replace(trial, keys=keys, fixed_keys=fixed)
    trainer = Trainer(trial, make_data(trial, text))
    (memory,) = [m for m in trainer.model.modules() if hasattr(m, "keys_name")]
    before = getattr(memory, memory.keys_name).detach().clone()
    values = memory.values.detach().clone()
    trainer.run(output=io.StringIO())
    assert torch.equal(getattr(memory, memory.keys_name), before) == fixed
    assert not torch.equal(memory.values, values)


def test_one_softmax_makes_one_weighted_mean_of_all_heads(trial):
    torch.manual_seed(0)
    memory = memory_maker(dataclasses.replace(trial, softmax="all"))()
    x = torch.randn(5, trial.dim)
    weights, slots = memory.lookup(x)
    assert slots.shape == weights.shape == (5, trial.heads, trial.top_k)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(5))
    usual = memory_maker(trial)()
    usual.load_state_dict(memory.state_dict())
    shares = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(usual.lookup(x)[0], shares)
    with pytest.raises(ValueError, match="softmax: 'all' is not allowed for flat keys"):
        dataclasses.replace(trial, keys="flat", softmax="all")
