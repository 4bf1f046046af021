"""transformers' Trainer and accelerate with memories of every form of gradient."""

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate import Accelerator  # noqa: E402
from ranks import run_two_ranks  # noqa: E402

import pkm_triton as pkm  # noqa: E402
from pkm_triton.hf.trainers import (  # noqa: E402
    MemoryTrainer,
    MemoryTrainerMixin,
    clip_all_gradients,
)

FORMS = [False, True, "factored"]


def model(sparse_grad, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).to(dtype)
    options = {"num_subkeys": 8, "heads": 2, "top_k": 4, "query_dim": 8, "query_norm": "layer"}
    pkm.hf.add_memories(net, [2], **options, sparse_grad=sparse_grad)
    return net


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 32, (32, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(net, folder, kind=MemoryTrainer, options=None, **arguments):
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(), "weight_decay": 0.1, "disable_tqdm": True,
        "adam_epsilon": 1e-3, "dataloader_pin_memory": False, **arguments,
    }  # fmt: skip
    args = transformers.TrainingArguments(**arguments)
    return kind(model=net, args=args, train_dataset=Tokens(), **(options or {}))


def logged(trained, name):
    return [entry[name] for entry in trained.state.log_history if name in entry]


@pytest.mark.parametrize(("form", "max_grad_norm"), [(True, 0.05), (True, 0.0), ("factored", 0.05)])
def test_as_with_dense_gradients_but_for_decay(form, max_grad_norm, tmp_path):
    """Values that decay and moments that fade in the steps that read them: off for this."""
    options = {"value_weight_decay": 0.0, "value_learning_rate": 0.0}
    arguments = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": 2}
    trained = [
        trainer(model(each), tmp_path, options=options, **arguments) for each in (False, form)
    ]
    for each in trained:
        each.train()
    dense, ours = trained
    assert len(logged(ours, "grad_norm")) == 4
    assert logged(ours, "grad_norm") == pytest.approx(logged(dense, "grad_norm"), rel=1e-4)
    assert logged(ours, "loss") == pytest.approx(logged(dense, "loss"), rel=1e-4)
    for (name, one), two in zip(
        ours.model.named_parameters(), dense.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_resumes_to_the_bit(form, tmp_path):
    whole = trainer(model(form, torch.bfloat16), tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(model(form, torch.bfloat16), tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), two in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_two_learning_rates_and_what_decays(tmp_path):
    net = model(True)
    made = trainer(net, tmp_path, options={"value_weight_decay": 0.3})
    decays, plain, values = made.create_optimizer().param_groups
    assert (decays["lr"], plain["lr"], values["lr"]) == (1e-2, 1e-2, 4e-2)
    assert [g["weight_decay"] for g in (decays, plain, values)] == [0.1, 0.0, 0.3]
    assert [id(p) for p in values["params"]] == [id(net.model.layers[1].mlp.values)]
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert len(names) == sum(len(g["params"]) for g in (decays, plain, values))
    assert made.create_optimizer() is made.optimizer


def test_of_another_trainer_and_with_an_optimiser_of_ones_own(tmp_path):
    class Other(MemoryTrainerMixin, transformers.Trainer):
        pass

    net = model("factored")
    optimiser = pkm.optim.SparseAdam(net.parameters(), lr=1e-3)
    made = trainer(net, tmp_path, Other, {"optimizers": (optimiser, None)}, max_steps=1)
    made.train()
    assert optimiser.state[net.model.layers[1].mlp.values]["step"] == 1


@pytest.mark.parametrize("name", ["value_learning_rate", "value_weight_decay"])
def test_bad_options(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        trainer(model(True), tmp_path, options={name: -1})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"optim": "adafactor"}, {}, "optim is 'adafactor', but must be adamw_torch or adamw_tor"),
        ({"optim_args": "a=1"}, {}, "optim_args is 'a=1', but must be None"),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "_kwargs is of .*SGD"),
    ],
)
def test_another_optimiser_is_refused_where_it_would_be_passed_over(
    arguments, options, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        trainer(model(True), tmp_path, options=options, **arguments)
    own = {"optimizers": (torch.optim.SGD(model(True).parameters(), lr=1.0), None)}
    assert trainer(model(True), tmp_path, options=own, optim="adafactor").optimizer is not None


@pytest.mark.parametrize("form", FORMS)
def test_accelerate_clips_all_gradients(form):
    accelerator = clip_all_gradients(Accelerator(cpu=not torch.cuda.is_available()))
    net, dense = model(form), model(False)
    net, optimiser = accelerator.prepare(net, pkm.optim.SparseAdam(net.parameters()))
    ids = Tokens().ids[:4].to(accelerator.device)
    accelerator.backward(net(input_ids=ids, labels=ids).loss)
    norm = accelerator.clip_grad_norm_(net.parameters(), 0.01)
    dense.to(ids.device)(input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01))
    for (name, one), two in zip(net.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), two[1].grad, msg=name)
    optimiser.step()


def test_what_is_no_accelerator():
    with pytest.raises(TypeError, match="accelerator must be an Accelerator, not int"):
        clip_all_gradients(3)


TWO_RANKS = """
import os
os.environ.update(
    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0",
    ACCELERATE_USE_CPU="true",
)
import importlib.util
spec = importlib.util.spec_from_file_location("trained", os.environ["TRAINED"])
trained = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trained)
out = {}
for form in trained.FORMS:
    made = trained.trainer(
        trained.model(form), folder, max_steps=1, weight_decay=0.0, ddp_backend="gloo"
    )
    assert made.args.world_size == 2
    made.train()
    assert isinstance(made.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    out[form] = {name: value.detach() for name, value in made.model.named_parameters()}
torch.save(out, f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path, monkeypatch):
    """A first step, in which rows that nobody read do not move in either form of gradient."""
    monkeypatch.setenv("TRAINED", __file__)
    run_two_ranks(TWO_RANKS, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for form in FORMS:
        for name, value in one[form].items():
            assert torch.equal(value, two[form][name]), name
            torch.testing.assert_close(value, one[False][name], msg=f"{form} {name}")
    start = dict(model(True).named_parameters())["model.layers.1.mlp.values"]
    assert not torch.equal(one[True]["model.layers.1.mlp.values"], start)
