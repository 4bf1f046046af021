import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

pytest.importorskip("transformers")

import transformers
from small_models import gpt2, llama
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import pkm_triton as pkm

SIZES = {"num_subkeys": 8, "heads": 2, "top_k": 4, "query_dim": 6}
IDS = torch.tensor([[5, 3, 9, 1], [7, 7, 2, 60]])


def trained(make_model, layers=(1, 3), **options):
    """A model whose weights and statistics have moved from where they began."""
    model = make_model()
    pkm.hf.add_memories(model, layers, **{**SIZES, **options})
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return model.eval()


def memories(model):
    return [m for m in model.modules() if isinstance(m, (pkm.ProductKeyMemory, pkm.FlatKeyMemory))]


def assert_same(loaded, model, *, outputs=True):
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    assert len(list(model.parameters())) == len(list(loaded.parameters()))
    assert [m.arguments() for m in memories(loaded)] == [m.arguments() for m in memories(model)]
    with torch.no_grad():  # rotary frequencies, no part of the state, are never loaded in bfloat16
        same = torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert same or not outputs


def loaders(kind):
    return (
        pkm.hf.from_pretrained,
        kind.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    )


@pytest.mark.parametrize("make_model", [llama, gpt2])
@pytest.mark.parametrize("share_values", [False, True])
def test_every_way_of_loading_brings_the_bits_back(make_model, share_values, tmp_path):
    model = trained(make_model, share_values=share_values)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for load in loaders(type(model)):
        loaded = load(tmp_path)
        assert_same(loaded, model)
        first, second = memories(loaded)
        assert (first.values is second.values) == share_values
        assert not getattr(loaded, "is_quantized", False)
        assert getattr(loaded, "hf_quantizer", None) is None


@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.ProductKeyExperts, pkm.FlatKeyMemory])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_what_was_loaded_gives_and_trains_the_same_bits(kind, sparse_grad, tmp_path):
    """Of several tokens: wherever safetensors leaves the tables, off 16-byte boundaries too."""
    model = trained(llama, kind=kind, query_norm="layer", query_dim=10, sparse_grad=sparse_grad)
    model.save_pretrained(tmp_path)
    loaded = pkm.hf.from_pretrained(tmp_path)
    assert_same(loaded, model)
    model.zero_grad()
    for each in (model, loaded):
        each(input_ids=IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad.to_dense(), theirs.grad.to_dense()), name


def test_a_shared_table_stays_one_where_moving_a_module_makes_new_parameters():
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = llama().to(torch.bfloat16)
        first, second = pkm.hf.add_memories(model, [1, 2], share_values=True, **SIZES)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert first.values is second.values
    assert first.values.dtype == torch.bfloat16


def test_sharded_files_and_a_second_round(tmp_path):
    model = trained(llama, share_values=True)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 2
    loaded = pkm.hf.from_pretrained(tmp_path / "one")
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "two")
    assert_same(pkm.hf.from_pretrained(tmp_path / "two"), model)


def test_experts_share_both_tables(tmp_path):
    model = llama()
    first, second = pkm.hf.add_memories(
        model, [1, 2], kind=pkm.ProductKeyExperts, share_values=True, activation="relu2", **SIZES
    )
    model.eval().save_pretrained(tmp_path)
    loaded = pkm.hf.from_pretrained(tmp_path)
    assert_same(loaded, model)
    for one, other in ((first, second), memories(loaded)):
        assert one.inputs is other.inputs
        assert one.values is other.values
        assert one.subkeys is not other.subkeys
        assert one.activation == "relu2"


@pytest.mark.parametrize(
    "options",
    [
        {"query_norm": "layer", "query_hidden": (5,), "sparse_grad": True},
        {"kind": pkm.FlatKeyMemory, "query_norm": None},
    ],
    ids=["options", "flat"],
)
def test_every_argument_comes_back(options, tmp_path):
    model = llama()
    pkm.hf.add_memories(model, [2], **{**SIZES, **options})
    model.eval().save_pretrained(tmp_path)
    assert_same(pkm.hf.from_pretrained(tmp_path), model)


def test_dtypes_that_are_not_the_models(tmp_path):
    model = llama().to(torch.bfloat16)
    (memory,) = pkm.hf.add_memories(model, [2], **SIZES)
    assert memory.subkeys.dtype == torch.bfloat16
    memory.subkeys.data = memory.subkeys.data.float() + 1e-4
    pkm.hf.write_config(model)
    model.eval().save_pretrained(tmp_path)
    assert_same(pkm.hf.from_pretrained(tmp_path), model, outputs=False)
    half = memories(pkm.hf.from_pretrained(tmp_path, dtype=torch.float16))[0]
    assert half.values.dtype == torch.float16
    assert torch.equal(half.subkeys, memory.subkeys)


def test_the_body_of_a_model_saved_with_its_head_and_the_other_way_round(tmp_path):
    model = trained(llama)
    model.save_pretrained(tmp_path / "head")
    body = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert type(body) is transformers.LlamaModel
    for one, other in zip(memories(body), memories(model), strict=True):
        assert torch.equal(one.values, other.values)
    body.save_pretrained(tmp_path / "body")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "body")
    for one, other in zip(memories(again), memories(model), strict=True):
        assert torch.equal(one.values, other.values)


def test_memories_put_in_otherwise(tmp_path):
    model = llama()
    pkm.replace_ffn(model, [1, 2], lambda: pkm.ProductKeyMemory(32, **SIZES))
    first, second = memories(model)
    second.values = first.values
    pkm.hf.write_config(model)
    model.eval().save_pretrained(tmp_path)
    loaded = pkm.hf.from_pretrained(tmp_path)
    assert_same(loaded, model)
    model.model.layers[2].mlp = first
    with pytest.raises(ValueError, match=r"at 'model.layers.0.mlp' and at 'model.layers.2.mlp'"):
        pkm.hf.write_config(model)


def test_padding_reaches_memories_that_were_loaded(tmp_path):
    trained(llama).save_pretrained(tmp_path)
    loaded = pkm.hf.from_pretrained(tmp_path)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with pkm.track_usage(loaded) as usages:
        loaded(input_ids=IDS, attention_mask=mask)
    assert [round(u.weight_sums.sum().item(), 4) for u in usages.values()] == [12, 12]


def test_training_goes_on_from_a_loaded_model(tmp_path):
    trained(llama).save_pretrained(tmp_path / "model")
    loaded = pkm.hf.from_pretrained(tmp_path / "model").train()
    losses = []
    optimiser = torch.optim.Adam(pkm.param_groups(loaded, lr=1e-2, value_lr=1e-2))
    for _ in range(10):
        loss = loaded(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


WITHOUT = """
import sys, transformers
for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)
"""


def test_loading_without_this_package_fails_and_names_it(tmp_path):
    trained(llama).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("pip install pkm-triton and import pkm_triton.hf before loading") == 2


def test_a_config_without_memories(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no memories: was add_memories or write_config"):
        pkm.hf.from_pretrained(tmp_path)
    trained(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["MyOwn"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names the class 'MyOwn', which transformers has not"):
        pkm.hf.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(3, 3), {}, TypeError, "model must be a PreTrainedModel, not Linear"),
        (None, {"kind": nn.Linear}, TypeError, "kind must be ProductKeyMemory or Fl"),
        (None, {"share_values": 1}, TypeError, "share_values is 1, but must be True or False"),
        (None, {"wings": 2}, TypeError, "'wings' is no option of ProductKeyMemory: value_dim"),
        (None, {"dim": 32}, TypeError, "'dim' is no option of ProductKeyMemory: value_dim, num"),
        (None, {"dtype": torch.float64}, TypeError, "'dtype' is no option of ProductKeyMemory"),
        (None, {"device": "meta"}, ValueError, "device is 'meta', but must be one that holds data"),
        (None, {"ffn": ""}, ValueError, "ffn is '', but must name a module within a layer"),
        (None, {"gate": "relu"}, TypeError, "'gate' is no option of ProductKeyMemory"),
        (None, {"layers": []}, ValueError, "layers is empty, but must name at least one"),
        (None, {"layers": 1}, TypeError, "layers must be a sequence of integers"),
        (None, {"top_k": 0}, ValueError, "top_k is 0"),
        (None, {"ffn": "feed"}, ValueError, "ffn is 'feed'.* to a y of its width: 'mlp'"),
    ],
)
def test_wrong_arguments_change_nothing(model, options, error, message):
    given = llama() if model is None else model
    before = dict(given.named_modules())
    with pytest.raises(error, match=message):
        pkm.hf.add_memories(given, **{"layers": [1], **SIZES, **options})
    assert dict(given.named_modules()) == before
    if model is None:
        assert getattr(given.config, "quantization_config", None) is None


def test_a_layer_that_has_a_memory_keeps_it():
    model = llama()
    (memory,) = pkm.hf.add_memories(model, [2], **SIZES)
    with pytest.raises(ValueError, match="names layer 2, but that layer has a memory"):
        pkm.hf.add_memories(model, [1, 2], kind=pkm.ProductKeyExperts, gate="relu", **SIZES)
    assert [m for m in model.modules() if isinstance(m, pkm.ProductKeyMemory)] == [memory]


def test_a_memory_of_ones_own_is_refused():
    class Mine(pkm.ProductKeyMemory):
        pass

    model = llama()
    pkm.replace_ffn(model, [1], lambda: Mine(32, **SIZES))
    with pytest.raises(TypeError, match=r"'model.layers.0.mlp' is a Mine, but only"):
        pkm.hf.write_config(model)


class Eighths(nn.Linear):
    """A map whose weights are multiples of an eighth, in int8."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = torch.empty_like(self.weight, dtype=torch.int8)
        if not linear.weight.is_meta:
            weight = (linear.weight * 8).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 8)


@register_quantization_config("eighths")
class EighthsConfig(QuantizationConfigMixin):
    def __init__(self, quant_method="eighths"):
        self.quant_method = quant_method


@register_quantizer("eighths")
class EighthsQuantizer(HfQuantizer):
    is_trainable = False

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, **_):
        quantise(model)


def quantise(model):
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Eighths(getattr(layer.mlp, name)))
    return model


def test_a_quantised_model_keeps_its_quantiser(tmp_path):
    model = quantise(llama().to(torch.bfloat16))
    model.config.quantization_config = EighthsConfig()
    model.hf_quantizer = EighthsQuantizer(model.config.quantization_config)
    (memory,) = pkm.hf.add_memories(model, [2], **SIZES)
    assert {p.dtype for p in memory.parameters()} == {torch.bfloat16}
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model, outputs=False)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, Eighths)
    assert type(loaded.model.layers[1].mlp.query_net.layers[0]) is nn.Linear
    assert type(loaded.hf_quantizer) is EighthsQuantizer
    assert loaded.is_quantized
    loaded.save_pretrained(tmp_path / "again")
    assert_same(pkm.hf.from_pretrained(tmp_path / "again"), model, outputs=False)


def test_where_a_model_lies_and_its_config(tmp_path):
    with pytest.raises(TypeError, match="path must be a name or a Path, not 3"):
        pkm.hf.from_pretrained(3)
    model = trained(llama)
    model.save_pretrained(tmp_path / "within")
    assert_same(pkm.hf.from_pretrained(tmp_path, subfolder="within"), model)
    other = llama()
    other.config.num_hidden_layers = 1
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no memories"):
        pkm.hf.from_pretrained(tmp_path)
    assert_same(pkm.hf.from_pretrained(tmp_path, subfolder="within"), model)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "within")
    assert_same(pkm.hf.from_pretrained(tmp_path / "within", config=config), model)
    config = copy.deepcopy(model.config)
    assert_same(pkm.hf.from_pretrained(tmp_path / "within", config=model.config), model)
    assert model.config.to_dict() == config.to_dict()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(memories(model)[0], "values")
    return model


def compiled(model):
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    return model


def tuned(model):
    pkm.train_slots(memories(model)[0], torch.arange(3))
    return model


def rebuilt(model):
    return transformers.AutoModelForCausalLM.from_config(model.config)


@pytest.mark.parametrize("size", ["50GB", "8KB"])
@pytest.mark.parametrize("change", [parametrized, compiled, tuned, rebuilt])
def test_parts_of_a_memory_that_its_config_does_not_tell_of_are_not_dropped(change, size, tmp_path):
    change(trained(llama)).save_pretrained(tmp_path, max_shard_size=size)
    message = r"the weights have layers.0.mlp.*, which the memory at 'layers.0.mlp' has not"
    for load in (*loaders(transformers.LlamaForCausalLM), transformers.AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_a_memory_without_its_weights_is_not_made_up(tmp_path):
    model = trained(llama)
    state = model.state_dict()
    del state["model.layers.0.mlp.values"]
    model.save_pretrained(tmp_path, state_dict=state)
    for load in loaders(transformers.LlamaForCausalLM):
        with pytest.raises(
            ValueError, match=r"weights have no model.layers.0.mlp.values, which th"
        ):
            load(tmp_path)


def test_what_is_loaded_may_be_initialised_and_copied(tmp_path):
    trained(llama).save_pretrained(tmp_path)
    memory = copy.deepcopy(memories(pkm.hf.from_pretrained(tmp_path))[0])
    memory._initialise(set())
    assert memory.values.std() > 0


def test_names_without_what_wraps_a_module(tmp_path):
    model = trained(llama)
    before = model.config.quantization_config.to_dict()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    compiled_memory = torch.compile(model.model.layers[2].mlp, backend="eager")
    model.model.layers[2].mlp = compiled_memory
    pkm.hf.write_config(model)
    assert model.config.quantization_config.to_dict() == before
    model.model.layers[2].mlp = compiled_memory._orig_mod
    model.save_pretrained(tmp_path)
    loaded = pkm.hf.from_pretrained(tmp_path)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_to_write():
    model = llama()
    with pytest.raises(ValueError, match="model has no memories to write into its config"):
        pkm.hf.write_config(model)
    assert getattr(model.config, "quantization_config", None) is None
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, not Linear"):
        pkm.hf.write_config(nn.Linear(2, 2))


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision, text_config=llama().config, image_token_index=3
        )
    )


@pytest.mark.parametrize(
    ("make_model", "parts", "ffn"),
    [
        (t5, ["encoder"], "layer.1"),
        (t5, ["encoder", "decoder"], "layer.1"),
        (llava, ["model.language_model"], "mlp"),
        (llava, ["model.vision_tower", "model.language_model"], "mlp"),
    ],
)
def test_parts_of_a_model(make_model, parts, ffn, tmp_path):
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"several lists .*give one part .*`part` of add_memories"):
        pkm.hf.add_memories(model, [2], ffn=ffn, **SIZES)
    assert dict(model.named_modules()) == before
    for part in parts:
        name = "layer.2" if part == "decoder" else ffn
        pkm.hf.add_memories(model, [2], part=part, ffn=name, share_values=True, **SIZES)
    assert len(memories(model)) == len(parts)
    model.save_pretrained(tmp_path)
    for load in (pkm.hf.from_pretrained, type(model).from_pretrained):
        ours, theirs = model.state_dict(), load(tmp_path).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_part_that_there_is_not():
    model = t5()
    with pytest.raises(
        ValueError, match="part is 'body', but model has no such module; it has 'sh"
    ):
        pkm.hf.add_memories(model, [1], part="body", **SIZES)
    with pytest.raises(TypeError, match="part must be a name, not 3"):
        pkm.hf.add_memories(model, [1], part=3, **SIZES)


def test_a_memory_that_is_offloaded_to_a_disk(tmp_path):
    pytest.importorskip("accelerate")
    model = trained(llama)
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"lm_head": "cpu", **{f"model.layers.{i}": "disk" for i in range(3)}}
    loaded = pkm.hf.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    assert memories(loaded)[0].values.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
