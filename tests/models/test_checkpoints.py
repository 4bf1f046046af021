import errno
import os

import pytest
import torch
from small_models import HUGGING_FACE, make_memory
from torch import nn

import pkm_triton as pkm
from pkm_triton import checkpoints
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
    assert loaded.layers[2].ffn.subkeys is loaded.layers[1].ffn.subkeys
    assert len(list(loaded.parameters())) == len(list(model.parameters()))

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
    assert type(loaded.layers[0].ffn.query_net.norm) is nn.BatchNorm1d
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
    monkeypatch.setattr(checkpoints, "_VERSION", 2)
    save_with_memory(own(), tmp_path / "model.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 2, but this reads version 1"):
        load_with_memory(own(), tmp_path / "model.pt")


def test_a_derived_memory_is_refused_before_anything_is_written(tmp_path):
    class Mine(pkm.ProductKeyMemory):
        pass

    model = own()
    replace_ffn(model, [1], lambda: Mine(32, num_subkeys=4, top_k=2, query_dim=4), ffn="ffn")
    with pytest.raises(TypeError, match=r"memory 'layers.0.ffn' is a Mine"):
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

    def on_a_full_disk(**_):
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / "gone")

    monkeypatch.setattr(checkpoints.tempfile, "mkstemp", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_with_memory(with_memories(own()), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
