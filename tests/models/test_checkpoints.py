import errno
import os

import pytest
import torch
from small_models import HUGGING_FACE, make_memory
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import pkm_triton as pkm
from pkm_triton import _files, checkpoints
from pkm_triton.batch_norm import QueryBatchNorm
from pkm_triton.transformer import Transformer, load_with_memory, replace_ffn, save_with_memory


def own(**changes):
    return Transformer(11, 32, 3, 2, 8, **changes)


def with_memories(model, layers=(1, 3), **changes):
    replace_ffn(model, layers, lambda: make_memory(**changes), ffn="ffn")
    return model


def a_step(model, tokens):
    """Move every weight and the batch statistics away from where they began."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens).square().mean().backward()
    optimiser.step()
    model.zero_grad()


def assert_same_bits(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@HUGGING_FACE
def test_hugging_face_models_come_back_bitwise_where_a_plain_reload_drops_the_memory(
    make_model, tmp_path
):
    transformers = pytest.importorskip("transformers")
    model = make_model()
    replace_ffn(model, [2], make_memory)
    ids = torch.randint(0, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    model.eval()
    model.save_pretrained(tmp_path / "plain")
    save_with_memory(model, tmp_path / "model.pt")

    plain = type(model).from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, pkm.ProductKeyMemory) for module in plain.modules())

    config = transformers.AutoConfig.from_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert load_with_memory(loaded, tmp_path / "model.pt") is loaded
    assert_same_bits(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.get_output_embeddings().weight is not None
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight
            for m in (model, loaded)]  # fmt: skip
    assert tied[0] == tied[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_norm": None, "query_hidden": (5, 7), "top_k": 64, "sparse_grad": True},
        {"query_norm": "layer", "heads": 1, "num_subkeys": 3, "top_k": 2},
    ],
    ids=["default", "hidden", "small"],
)
def test_every_argument_of_a_memory_comes_back(changes, tmp_path):
    model = with_memories(own(), **changes)
    tokens = torch.randint(0, 11, (4, 8))
    if not changes.get("sparse_grad"):
        a_step(model, tokens)
    save_with_memory(model, tmp_path / "model.pt")
    loaded = load_with_memory(own(), tmp_path / "model.pt")
    assert_same_bits(loaded, model)
    assert loaded.layers[0].ffn.arguments() == model.layers[0].ffn.arguments()
    assert repr(loaded) == repr(model)
    assert torch.equal(loaded.eval()(tokens), model.eval()(tokens))


def test_flat_keys_torchs_layers_and_mixed_dtypes(tmp_path):
    def make():
        return nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
        )

    model = make()
    sizes = {"num_subkeys": 4, "heads": 2, "top_k": 4, "query_dim": 6}
    (memory,) = replace_ffn(model, [2], lambda: pkm.FlatKeyMemory(32, **sizes))
    memory.values.data = memory.values.data.to(torch.bfloat16)
    save_with_memory(model, tmp_path / "model.pt")
    loaded = load_with_memory(make().eval(), tmp_path / "model.pt")
    assert_same_bits(loaded, model)
    assert loaded.layers[1].linear1.values.dtype == torch.bfloat16
    assert not loaded.layers[1].linear1.training


def test_shared_values_and_a_shared_layer_stay_shared(tmp_path):
    model = with_memories(own(), layers=(1, 2, 3))
    model.layers[1].ffn.values = model.layers[0].ffn.values
    model.layers[2].ffn = model.layers[1].ffn
    save_with_memory(model, tmp_path / "model.pt")
    one_table = (tmp_path / "model.pt").stat().st_size
    loaded = load_with_memory(own(), tmp_path / "model.pt")
    assert_same_bits(loaded, model)
    tables = [layer.ffn.values for layer in loaded.layers]
    assert tables[0] is tables[1]
    assert tables[1] is tables[2]
    assert loaded.layers[2].ffn is loaded.layers[1].ffn
    assert loaded.layers[1].ffn is not loaded.layers[0].ffn
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    loaded.load_state_dict(loaded.state_dict(), assign=True)
    assert loaded.layers[0].ffn.values is loaded.layers[1].ffn.values

    apart = with_memories(own(), layers=(1, 2, 3))
    save_with_memory(apart, tmp_path / "apart.pt")
    assert (tmp_path / "apart.pt").stat().st_size > one_table + 2 * 64 * 32 * 4
    assert len(list(load_with_memory(own(), tmp_path / "apart.pt").parameters())) > len(
        list(model.parameters())
    )


def test_a_model_that_has_its_memories_already(tmp_path):
    model = with_memories(own())
    save_with_memory(model, tmp_path / "model.pt")
    other = with_memories(own())
    memory = other.layers[0].ffn
    load_with_memory(other, tmp_path / "model.pt")
    assert other.layers[0].ffn is memory
    assert_same_bits(other, model)

    with pytest.raises(ValueError, match=r"memory 'layers.0.ffn' is ProductKeyMemory .*'heads': 1"):
        load_with_memory(with_memories(own(), heads=1), tmp_path / "model.pt")


def test_a_synchronised_norm_comes_back_as_batch_norm(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(with_memories(own()))
    save_with_memory(model, tmp_path / "model.pt")
    loaded = load_with_memory(own(), tmp_path / "model.pt")
    assert type(loaded.layers[0].ffn.query_net.norm) is QueryBatchNorm
    assert_same_bits(loaded, model)


@pytest.mark.parametrize(
    ("make_other", "message"),
    [
        (
            lambda: Transformer(12, 32, 3, 2, 8),
            r"'tokens.weight' is torch.float32 \[11, 32\] there",
        ),
        (lambda: Transformer(11, 32, 4, 2, 8), "'layers.3.* is in the model only"),
        (lambda: Transformer(11, 32, 2, 2, 8), "model has no module 'layers.2.ffn'"),
        (lambda: own(norm="post"), "'embedding_norm.bias' is in the model only"),
        (lambda: own(dtype=torch.float64), "but torch.float64"),
        (lambda: with_memories(own(), layers=(2,)), "'layers.1.ffn.0.bias' is in the file only"),
    ],
)
def test_a_file_of_another_configuration_changes_nothing(make_other, message, tmp_path):
    save_with_memory(with_memories(own()), tmp_path / "model.pt")
    other = make_other()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_with_memory(other, tmp_path / "model.pt")
    after = other.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError):
        load_with_memory(own(), path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="is no file of pkm_triton model with memory"):
        load_with_memory(own(), path)
    torch.save(own().state_dict(), path)
    with pytest.raises(ValueError, match="is no file of pkm_triton model with memory"):
        load_with_memory(own(), path)
    save_with_memory(own(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="or broken"):
        load_with_memory(own(), path)


def test_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_VERSION", 3)
    save_with_memory(own(), tmp_path / "model.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 3, but this reads version 2"):
        load_with_memory(own(), tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.SafeTensors"])
def test_a_name_by_which_others_would_misread_it(name, tmp_path):
    with pytest.raises(ValueError, match=f"path is .*{name}', but .* let its name end in '.pt'"):
        save_with_memory(with_memories(own()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [3, None])
def test_what_is_no_path(path):
    for call in (save_with_memory, load_with_memory):
        with pytest.raises(TypeError, match=f"path must be a name or a Path, not {path}"):
            call(own(), path)


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "none" / "model.pt"
    for call in (save_with_memory, load_with_memory):
        with pytest.raises(FileNotFoundError) as caught:
            call(own(), path)
        assert caught.value.filename == str(path)


def test_a_derived_memory_is_refused_before_anything_is_written(tmp_path):
    class Mine(pkm.ProductKeyMemory):
        pass

    model = own()
    replace_ffn(model, [1], lambda: Mine(32, num_subkeys=4, top_k=2, query_dim=4), ffn="ffn")
    with pytest.raises(TypeError, match=r"memory 'layers.0.ffn' is a Mine"):
        save_with_memory(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_memory_with_an_adapter_within_is_refused(tmp_path):
    model = with_memories(own())
    layers = model.layers[0].ffn.query_net.layers
    layers[0] = nn.Sequential(layers[0], nn.Identity())
    with pytest.raises(TypeError, match=r"'query_net.layers.0.0.bias' is not what a ProductKeyMem"):
        save_with_memory(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    model = with_memories(own())
    save_with_memory(model, path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_with_memory(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_torchs_writer_tells_of_a_full_disk(tmp_path, monkeypatch):
    """The bytes of a large file meet a disk without space: the reason is not lost."""

    def on_a_full_disk(_):
        return os.open("/dev/full", os.O_WRONLY), tmp_path / "gone"

    monkeypatch.setattr(_files, "_create", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_with_memory(with_memories(own()), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def twins(tied):
    """Two maps, which may be one parameter, and a memory."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "m": make_memory()})
    if tied:
        model["b"].weight = model["a"].weight
    return model


def unchanged(model, before):
    after = model.state_dict()
    return list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_parameters_that_the_model_shares_and_the_file_has_apart(tmp_path):
    save_with_memory(twins(False), tmp_path / "model.pt")
    model = twins(True)
    before = copied(model)
    with pytest.raises(ValueError, match=r"parameter between 'a.weight' and 'b.weight', which"):
        load_with_memory(model, tmp_path / "model.pt")
    assert unchanged(model, before)
    save_with_memory(twins(True), tmp_path / "model.pt")
    loaded = load_with_memory(twins(False), tmp_path / "model.pt")
    assert loaded["a"].weight is loaded["b"].weight


def test_tables_that_the_model_shares_and_the_file_has_apart(tmp_path):
    save_with_memory(with_memories(own()), tmp_path / "model.pt")
    model = with_memories(own())
    model.layers[2].ffn.values = model.layers[0].ffn.values
    before = copied(model)
    with pytest.raises(ValueError, match=r"between 'layers.0.ffn.values' and 'layers.2.ffn.val"):
        load_with_memory(model, tmp_path / "model.pt")
    assert unchanged(model, before)
    model.layers[2].ffn = model.layers[0].ffn
    with pytest.raises(ValueError, match="the model shares one parameter between"):
        load_with_memory(model, tmp_path / "model.pt")


class Extra(nn.Linear):
    def __init__(self, state):
        super().__init__(4, 4)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


def test_extra_state(tmp_path):
    state = {"scale": [1.5, None, {"name": (True, "x")}], "of": torch.arange(3)}
    model = nn.ModuleDict({"extra": Extra(state), "m": make_memory()})
    save_with_memory(model, tmp_path / "model.pt")
    other = nn.ModuleDict({"extra": Extra(None), "m": make_memory()})
    loaded = load_with_memory(other, tmp_path / "model.pt")["extra"].state
    assert loaded["scale"] == state["scale"]
    assert torch.equal(loaded["of"], state["of"])
    model["extra"].state = {"of": object()}
    with pytest.raises(TypeError, match=r"the state 'extra._extra_state' is a dict, but must be"):
        save_with_memory(model, tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


def test_models_without_data(tmp_path):
    save_with_memory(with_memories(own()), tmp_path / "model.pt")
    with torch.device("meta"):
        model = own()
    with pytest.raises(ValueError, match=r"model has 'tokens.weight' on the meta device: give it"):
        load_with_memory(model, tmp_path / "model.pt")
    with pytest.raises(TypeError, match="is on the meta device, and holds nothing to save"):
        save_with_memory(model, tmp_path / "other.pt")
    load_with_memory(model.to_empty(device="cpu"), tmp_path / "model.pt")


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpoint_memory(layer):
    layer.ffn = checkpoint_wrapper(layer.ffn)
    return layer


def within(model, wrap):
    """The model, its first layer wrapped."""
    model.layers[0] = wrap(model.layers[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        lambda model: compiled(nn.DataParallel(model)),
        lambda model: within(model, compiled),
        checkpoint_wrapper,
        lambda model: within(model, checkpoint_wrapper),
        lambda model: within(model, checkpoint_memory),
    ],
    ids=["compiled", "parallel", "both", "part", "checkpointed", "cp. layer", "cp. memory"],
)
def test_wrappers_are_left_out(wrap, tmp_path):
    model = with_memories(own())
    state = copied(model)
    save_with_memory(wrap(model), tmp_path / "model.pt")
    loaded = load_with_memory(own(), tmp_path / "model.pt")
    assert unchanged(loaded, state)


def test_loading_into_a_wrapped_model(tmp_path):
    model = with_memories(own())
    save_with_memory(model, tmp_path / "model.pt")
    wrapped = compiled(own())
    assert load_with_memory(wrapped, tmp_path / "model.pt") is wrapped
    assert_same_bits(wrapped._orig_mod, model)


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_loading_where_a_layer_is_wrapped(wrap, tmp_path):
    model = with_memories(own())
    save_with_memory(model, tmp_path / "model.pt")
    other = within(own(), wrap)
    state, modules = copied(other), list(other.modules())
    with pytest.raises(ValueError, match=r"wrapped for checkpointing, around 'layers.0.ffn', whe"):
        load_with_memory(other, tmp_path / "model.pt")
    assert unchanged(other, state)
    assert list(other.modules()) == modules
    if wrap is checkpoint_wrapper:  # and its memories are there already
        other = load_with_memory(within(with_memories(own()), wrap), tmp_path / "model.pt")
        assert_same_bits(other, model)


class Shard(torch.Tensor):
    pass


def test_a_model_of_other_tensors_is_left_as_it_is(tmp_path):
    save_with_memory(with_memories(own()), tmp_path / "model.pt")
    model = own()
    model.tokens.weight = nn.Parameter(model.tokens.weight.detach().as_subclass(Shard))
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"has 'tokens.weight' as a Shard, but must have plain"):
        load_with_memory(model, tmp_path / "model.pt")
    assert list(model.modules()) == modules


def test_sharded_state_is_refused(tmp_path):
    model = with_memories(own())
    model.tokens.weight = nn.Parameter(model.tokens.weight.detach().as_subclass(Shard))
    with pytest.raises(TypeError, match=r"'tokens.weight' is a Shard, but must be a plain tensor"):
        save_with_memory(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def rename(content, old, new):
    content["state"] = {new if n == old else n: t for n, t in content["state"].items()}


MEMORY = "layers.0.ffn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("state"), "broken: 'state'"),
        (lambda c: c.pop("memories"), "broken: 'memories'"),
        (lambda c: c.update(memories=3), "broken"),
        (lambda c: c.update(state=[]), "broken"),
        (lambda c: c["state"].update(x=3), "broken: the state 'x' is no plain tensor"),
        (lambda c: c["memories"][0].pop("kind"), "broken: 'kind'"),
        (lambda c: c["memories"][0].update(kind="Linear"), "no memory of the kind 'Linear'"),
        (lambda c: c["memories"][0].update(names=MEMORY), "'layers.0.ffn' is no list of names"),
        (lambda c: c["memories"][0].update(names=["nowhere"]), "model has no module 'nowhere'"),
        (lambda c: c["memories"][0]["arguments"].update(top_k=65), "broken: no memory can be so"),
        (lambda c: c["memories"][0]["arguments"].update(wings=2), "broken: no memory can be so"),
        (lambda c: c["memories"][0]["arguments"].update(heads=2**40), "another configur"),
        (lambda c: c["memories"][0]["arguments"].update(num_subkeys=40000), "another configurat"),
        (lambda c: c.update(shared=[["layers.0.ffn.values", "nothing"]]), "broken: 'nothing'"),
        (lambda c: c.update(shared=[["tokens.weight", "positions.weight"]]), "differ in shape"),
        (
            lambda c: c.update(shared=[[f"{MEMORY}.query_net.norm.running_mean"]]),
            "'layers.0.ffn.query_net.norm.running_mean' is no parameter of the model",
        ),
        (lambda c: rename(c, "tokens.weight", "tokens.height"), "'tokens.height' is in the file"),
    ],
)
def test_a_crafted_file_is_refused_and_changes_nothing(change, message, tmp_path):
    path = tmp_path / "model.pt"
    save_with_memory(with_memories(own()), path)
    content = torch.load(path)
    content.pop("checksums")
    change(content)
    checkpoints.write_tensors(path, content)
    model = own()
    before, modules = copied(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=f"(?s)model.pt.*{message}|{message}.*model.pt"):
        load_with_memory(model, path)
    assert unchanged(model, before)
    assert dict(model.named_modules()) == modules


def test_files_of_the_first_version(tmp_path):
    path = tmp_path / "model.pt"
    model = with_memories(own())
    save_with_memory(model, path)
    content = torch.load(path)
    content.pop("checksums")
    content["version"] = 1
    content["memories"] = {
        memory["names"][0]: {"kind": memory["kind"], "arguments": memory["arguments"]}
        for memory in content["memories"]
    }
    torch.save(content, path)
    assert_same_bits(load_with_memory(own(), path), model)
