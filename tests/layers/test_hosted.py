"""The layers within what others build around modules: parametrizations, PEFT, transformers."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient
from pkm_triton.training import table_parameters

SIZES = {"num_subkeys": 8, "heads": 2, "top_k": 3, "query_dim": 8}
KINDS = pytest.mark.parametrize(
    "kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory, pkm.ProductKeyExperts]
)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@KINDS
def test_parametrizations_of_every_parameter(kind):
    layer = kind(8, **SIZES).eval()
    twin = copy.deepcopy(layer)
    names = ["values", kind.keys_name]
    for name in names:
        parametrize.register_parametrization(layer, name, Double())
    with torch.no_grad():
        for name in names:
            twin.get_parameter(name).mul_(2)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), twin(x))
    assert {f"parametrizations.{name}.original" for name in names} < set(layer.state_dict())
    for name in names:
        module = layer.get_submodule(f"parametrizations.{name}")
        assert isinstance(module, parametrize.ParametrizationList)
        assert layer.get_parameter(f"parametrizations.{name}.original").requires_grad
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    layer(x).sum().backward()
    assert layer.parametrizations["values"].original.grad.abs().sum() > 0
    for name in names:
        parametrize.remove_parametrizations(layer, name)
    assert type(layer) is kind
    assert torch.equal(layer(x), twin(x))


def test_spectral_norm():
    layer = pkm.ProductKeyMemory(8, **SIZES).eval()
    parametrizations.spectral_norm(layer, "values", n_power_iterations=20)
    layer.train()
    layer(torch.randn(5, 8))
    assert torch.linalg.matrix_norm(layer.values, 2).item() == pytest.approx(1, abs=0.05)


@KINDS
@pytest.mark.parametrize("sparse_grad", [True, "factored"])
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_gradients_behind_a_parametrization_are_those_of_dense_ones(kind, sparse_grad, norm):
    x, found = torch.randn(5, 8), []
    for form in (False, sparse_grad):
        torch.manual_seed(0)
        layer = kind(8, **SIZES, query_norm="layer", sparse_grad=form)
        norm(layer, "values")
        layer(x).sin().sum().backward()
        if kind is pkm.ProductKeyExperts and form == "factored":
            assert type(layer.inputs.grad) is FactoredGradient  # no one made that one
            layer.inputs.grad = layer.inputs.grad.to_sparse()
        found.append({name: each.grad.to_dense() for name, each in layer.named_parameters()})
    dense, ours = found
    for name, grad in ours.items():
        torch.testing.assert_close(grad, dense[name], msg=name)
    if norm is parametrizations.weight_norm:
        assert len(table_parameters(layer)) == 2 + (kind is pkm.ProductKeyExperts)
        rest, values = pkm.param_groups(layer)
        assert {id(p) for p in values["params"]} == {id(p) for p in table_parameters(layer)}
        assert len(rest["params"]) + len(values["params"]) == len(list(layer.parameters()))


def test_old_state_dicts_load():
    layer = pkm.FlatKeyMemory(8, **SIZES)
    assert {"values", "keys"} < set(layer.state_dict())


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM, config


@KINDS
@pytest.mark.parametrize("by_hand", [False, True])
def test_memories_that_a_checkpoint_lacks_are_initialised(kind, by_hand, tmp_path):
    llama, config = tiny_llama()

    def make():
        return kind(32, num_subkeys=16, query_dim=16)

    class WithMemory(llama):
        def __init__(self, config):
            super().__init__(config)
            if by_hand:
                self.model.layers[1].mlp = make()
            else:
                pkm.replace_ffn(self, [2], make)

    llama(config).save_pretrained(tmp_path)
    torch.manual_seed(1)
    memory = WithMemory.from_pretrained(tmp_path).model.layers[1].mlp
    keys = memory.get_parameter(kind.keys_name)
    for table in memory.tables:
        assert table.detach().std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert memory.values.detach().std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert keys.abs().max() <= keys.shape[-1] ** -0.5
    assert keys.detach().std().item() == pytest.approx(keys.shape[-1] ** -0.5 / 3**0.5, rel=0.1)
    norm = memory.query_net.norm
    assert (norm.weight == 1).all()
    assert (norm.running_var == 1).all()
    assert (norm.bias == 0).all()
    assert norm.num_batches_tracked == 0
    linear = memory.query_net.layers[0]
    assert linear.weight.abs().max() <= 32**-0.5
    assert all(t.isfinite().all() for t in memory.state_dict().values())


def test_what_a_checkpoint_has_is_kept_and_what_it_lacks_is_made(tmp_path):
    llama, config = tiny_llama()

    class WithMemory(llama):
        def __init__(self, config):
            super().__init__(config)
            pkm.replace_ffn(self, [2], lambda: pkm.ProductKeyMemory(32, **SIZES))

    model = WithMemory(config).train()
    model(input_ids=torch.randint(0, 64, (2, 8)))  # moves the batch statistics
    model.save_pretrained(tmp_path / "whole")
    state = model.state_dict()
    loaded = WithMemory.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    name = "model.layers.1.mlp.values"
    state[name] = state[name].new_full(state[name].shape, torch.nan)
    model.save_pretrained(
        tmp_path / "part", state_dict={n: t for n, t in state.items() if n != name}
    )
    part = WithMemory.from_pretrained(tmp_path / "part").state_dict()
    assert part[name].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert all(torch.equal(part[n], t) for n, t in state.items() if n != name)


def test_adapters_for_the_table_of_values():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"memory": pkm.ProductKeyMemory(8, **SIZES)})
    values = model["memory"].values.detach().clone()
    config = peft.LoraConfig(target_modules=[], target_parameters=["memory.values"], r=2)
    adapted = peft.get_peft_model(model, config)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    x = torch.randn(5, 8)
    memory = adapted.base_model.model["memory"]
    memory(x).square().sum().backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().sum() > 0 for g in grads)
    assert torch.equal(memory.get_base_layer().values.detach(), values)


@KINDS
@pytest.mark.parametrize("held", [(), (1,), (2,)], ids=["none", "the first", "the second"])
def test_tables_shared_in_init_stay_shared(kind, held, tmp_path):
    """Loading makes a parameter of each name."""
    llama, config = tiny_llama()

    class WithMemories(llama):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = kind(32, num_subkeys=16, query_dim=16)
            pkm.share_values([layer.mlp for layer in self.model.layers])

    whole = WithMemories(config)
    gone = {
        f"model.layers.{i}.mlp.{name}"
        for i in {0, 1} - {i - 1 for i in held}
        for name in kind.table_names
    }
    state = {k: t.clone() for k, t in whole.state_dict().items() if k not in gone}
    whole.save_pretrained(tmp_path, state_dict=state)
    loaded = WithMemories.from_pretrained(tmp_path)
    first, second = (layer.mlp for layer in loaded.model.layers)
    for ours, theirs, before in zip(
        first.tables, second.tables, whole.model.layers[0].mlp.tables, strict=True
    ):
        assert ours is theirs
        assert torch.equal(ours, before) == bool(held)
        assert ours.detach().std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert first.query_net is not second.query_net


def test_a_class_that_shares_tables_saves_them_once(tmp_path):
    llama, config = tiny_llama()

    class WithMemories(llama):
        _tied_weights_keys: ClassVar = {"model.layers.1.mlp.values": "model.layers.0.mlp.values"}

        def __init__(self, config):
            super().__init__(config)
            layers = self.model.layers
            for layer in layers:
                layer.mlp = pkm.ProductKeyMemory(32, num_subkeys=16, query_dim=16)
            pkm.share_values([layer.mlp for layer in layers])

    model = WithMemories(config)
    model.save_pretrained(tmp_path)
    loaded = WithMemories.from_pretrained(tmp_path)
    first, second = (layer.mlp for layer in loaded.model.layers)
    assert first.values is second.values
    assert torch.equal(first.values, model.model.layers[1].mlp.values)


def test_a_copy_brings_no_other_along():
    layers = [pkm.ProductKeyMemory(8, **SIZES) for _ in range(2)]
    pkm.share_values(layers)
    alone = copy.deepcopy(layers[0])
    assert list(alone.pool) == [alone]
    assert [len(layer.pool) for layer in layers] == [2, 2]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what PEFT uses of transformers
@pytest.mark.parametrize("sparse_grad", [False, True, "factored"])
def test_an_adapter_that_keeps_the_statistics_of_a_batch_norm(sparse_grad, tmp_path):
    peft = pytest.importorskip("peft")
    llama, config = tiny_llama()

    def build():
        torch.manual_seed(0)
        model = llama(config)
        pkm.hf.add_memories(model, [2], num_subkeys=16, query_dim=16, sparse_grad=sparse_grad)
        return model

    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["query_net.norm"])
    model = peft.get_peft_model(build(), lora)
    ids = torch.randint(0, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()  # moves the statistics
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    plain = build().eval()(input_ids=ids).logits
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert not torch.equal(plain, again(input_ids=ids).logits)


def pickled(layers):
    return pickle.loads(pickle.dumps(layers))


def to_empty(layers):
    return layers.to_empty(device="cpu")


def assigned(layers):
    state = {name: torch.zeros_like(t, device="cpu") for name, t in layers.state_dict().items()}
    layers.load_state_dict(state, assign=True)
    return layers


@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.ProductKeyExperts])
@pytest.mark.parametrize("copied", [lambda layers: layers, copy.deepcopy, pickled])
@pytest.mark.parametrize("given", [to_empty, assigned])
def test_shared_tables_stay_one_when_they_get_memory(kind, copied, given):
    layers = nn.ModuleList(kind(8, num_subkeys=4, top_k=2, device="meta") for _ in range(3))
    shared = pkm.share_values(list(layers)[:2])
    layers = given(copied(layers))
    for name in layers[0].table_names:
        assert getattr(layers[0], name) is getattr(layers[1], name)
        assert getattr(layers[0], name) is not getattr(layers[2], name)
    assert not any(table.is_meta for table in layers.parameters())
    assert all(table.is_meta for table in shared)


def test_tables_shared_pair_by_pair_stay_one():
    layers = nn.ModuleList(
        pkm.ProductKeyMemory(8, num_subkeys=4, top_k=2, device="meta") for _ in range(5)
    )
    first, second, third, fourth, fifth = layers
    pkm.share_values([first, fifth])
    for other in (second, third):
        pkm.share_values([first, other])
    pkm.share_values([fourth, fifth])  # which leaves the first
    assert list(first.pool) == [first, second, third]
    to_empty(layers)
    assert first.values is second.values is third.values
    assert fourth.values is fifth.values is not first.values
