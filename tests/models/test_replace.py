import pytest
import torch
from small_models import HUGGING_FACE, make_memory
from torch import nn

import pkm_triton as pkm
from pkm_triton.transformer import Transformer, replace_ffn


def layers_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


@HUGGING_FACE
def test_a_hugging_face_model_reads_its_memory_learns_and_generates(make_model):
    model = make_model()
    (memory,) = replace_ffn(model, [2], make_memory)
    assert [layer.mlp is memory for layer in layers_of(model)] == [False, True, False]
    ids = torch.randint(0, 64, (2, 8))
    optimiser = torch.optim.Adam(pkm.param_groups(model, lr=1e-2, value_lr=1e-2))
    losses = []
    for _ in range(20):
        with pkm.track_usage(model) as usages:
            loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        assert memory.values.grad.abs().sum() > 0
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    (usage,) = usages.values()
    assert usage.weight_sums.sum() == pytest.approx(2 * 8 * 2)  # tokens · heads
    model.eval()
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 11)


@HUGGING_FACE
def test_a_hugging_face_layer_keeps_what_is_around_its_ffn(make_model):
    """With a memory of zeros the layer is attention and a residual: its FFN adds nothing."""
    model = make_model().eval()
    (memory,) = replace_ffn(model, [3], make_memory)
    nn.init.zeros_(memory.values)
    outputs = []
    handles = [
        layers_of(model)[2].register_forward_hook(lambda _, __, out: outputs.append(out)),
        memory.register_forward_pre_hook(lambda _, args: outputs.append(args[0])),
    ]
    with torch.no_grad():
        model(input_ids=torch.randint(0, 64, (2, 8)))
    for handle in handles:
        handle.remove()
    normed, out = outputs
    out = out[0] if isinstance(out, tuple) else out
    layer = layers_of(model)[2]
    norm = layer.post_attention_layernorm if hasattr(layer, "self_attn") else layer.ln_2
    torch.testing.assert_close(norm(out), normed, rtol=0, atol=0)


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_layers(norm_first):
    """The memory takes the place of the whole feed-forward block, in training and inference."""
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, batch_first=True, norm_first=norm_first, dropout=0.0
    )
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first)
    (memory,) = replace_ffn(model, [2], make_memory)
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    changed = model.layers[1]
    if norm_first:
        expected = x + changed._sa_block(changed.norm1(x), None, None)
        expected = expected + memory(changed.norm2(expected))
    else:
        expected = changed.norm1(x + changed._sa_block(x, None, None))
        expected = changed.norm2(expected + memory(expected))
    torch.testing.assert_close(changed(x), expected, rtol=0, atol=0)
    model.eval()
    slow = model(x, src_key_padding_mask=padding)
    with torch.no_grad(), pkm.track_usage(model) as usages:
        fast = model(x, src_key_padding_mask=padding)  # torch's fused path, where it may
    assert next(iter(usages.values())).weight_sums.sum() == pytest.approx((5 + 3) * 2)
    torch.testing.assert_close(slow[~padding], fast[~padding])


def test_torchs_decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0), 2)
    (memory,) = replace_ffn(model, [1], make_memory)
    out = model(torch.randn(4, 2, 32), torch.randn(3, 2, 32))
    out.sum().backward()
    assert memory.values.grad is not None
    assert {name for name, _ in model.layers[0].named_parameters() if "linear" in name} == {
        f"linear1.{name}" for name, _ in memory.named_parameters()
    }


def test_own_transformer_and_a_dotted_name():
    model = Transformer(11, 32, 3, 2, 8)
    replace_ffn(model, [1, 3], make_memory, ffn="ffn")
    kinds = [isinstance(layer.ffn, pkm.ProductKeyMemory) for layer in model.layers]
    assert kinds == [True, False, True]

    outer = nn.Module()
    outer.blocks = nn.ModuleList([nn.ModuleDict({"feed": nn.ModuleDict({"net": nn.ReLU()})})])
    (memory,) = replace_ffn(outer, [1], make_memory, ffn="feed.net")
    assert outer.blocks[0]["feed"]["net"] is memory


def test_dtype_and_training_mode_are_those_of_what_is_replaced():
    model = Transformer(11, 32, 2, 2, 8, dtype=torch.bfloat16).eval()
    (memory,) = replace_ffn(model, [2], make_memory, ffn="ffn")
    assert {parameter.dtype for parameter in memory.parameters()} == {torch.bfloat16}
    assert not memory.training
    assert not memory.query_net.norm.training


def encoder_and_decoder():
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)


@pytest.mark.parametrize(
    ("make_model", "layers", "ffn", "message"),
    [
        (lambda: Transformer(11, 32, 3, 2, 8), [4], "ffn", "layers names layer 4, but the model"),
        (lambda: Transformer(11, 32, 3, 2, 8), [0], "ffn", "layers is 0, but must be"),
        (lambda: Transformer(11, 32, 3, 2, 8), [1, 1], "ffn", "may be named only once"),
        (lambda: Transformer(11, 32, 3, 2, 8), [1], "mlp", "ffn is 'mlp', but model has no list"),
        (lambda: nn.Linear(3, 3), [1], "mlp", "ffn is 'mlp', but model has no list"),
        (encoder_and_decoder, [1], "mlp", "several lists .* encoder.layers, decoder.layers"),
    ],
)
def test_bad_arguments_leave_the_model_alone(make_model, layers, ffn, message):
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_ffn(model, layers, make_memory, ffn=ffn)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 5}, "model must be a module, not int"),
        ({"layers": 1}, "layers must be a sequence of integers, such as .*, not 1"),
        ({"layers": [1.5]}, "layers must be an integer, not 1.5"),
        ({"ffn": 3}, "ffn must be a name, not 3"),
        ({"make_memory": 3}, "make_memory must be a function, not int"),
    ],
)
def test_arguments_of_another_type(change, message):
    model = Transformer(11, 32, 3, 2, 8)
    before = dict(model.named_modules())
    given = {"model": model, "layers": [1], "make_memory": make_memory, "ffn": "ffn", **change}
    with pytest.raises(TypeError, match=message):
        replace_ffn(**given)
    assert dict(model.named_modules()) == before


def test_make_memory_must_make_modules():
    model = Transformer(11, 32, 3, 2, 8)
    with pytest.raises(TypeError, match="make_memory must return a module, not NoneType"):
        replace_ffn(model, [1], lambda: None, ffn="ffn")
    assert isinstance(model.layers[0].ffn, nn.Sequential)


def test_transformers_is_not_imported_by_the_library():
    import subprocess
    import sys

    code = "import sys, pkm_triton; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def hugging_face(kind, **config):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"hidden_size": 32, "intermediate_size": 64, **config}
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))


MIXTURE = {"num_local_experts": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("make_model", "ffn", "message"),
    [
        (
            lambda: hugging_face("gpt_oss", **MIXTURE),
            "mlp",
            r"takes apart what it returns, self.mlp\(hidden_states\): .*No module of the layer",
        ),
        (
            lambda: hugging_face("bloom"),
            "mlp",
            r"hands over more than x, self.mlp\(layernorm_output, residual\)",
        ),
        (
            lambda: hugging_face("bert"),
            "mlp",
            "no list of layers .*No module of the layer .* 'attention', 'intermediate', 'output'",
        ),
        (lambda: hugging_face("bert"), "intermediate", r"module 'intermediate' .* maps 32 to 64"),
        (lambda: hugging_face("bert"), "output", r"hands over more than x, self.output\("),
        (lambda: hugging_face("opt", ffn_dim=64), "fc1", "module 'fc1' .* maps 32 to 64"),
        (lambda: hugging_face("opt", ffn_dim=64), "fc2", "module 'fc2' .* maps 64 to 32"),
        (lambda: hugging_face("llama"), "ffn", "to a y of its width: 'mlp'"),
        (lambda: hugging_face("llama"), "", "ffn is '', but must name a module within a layer"),
        (lambda: hugging_face("mamba"), "mixer", "more than x, .* No module of the layer maps"),
        (lambda: hugging_face("llama"), "self_attn", "takes apart what it returns"),
        (lambda: Transformer(11, 24, 2, 2, 8), "ffn", "maps width 32 to 32, .* maps 24 to 24"),
    ],
    ids=[
        *("gpt-oss", "bloom", "bert", "bert half", "bert other", "opt", "opt half", "name"),
        *("no name", "mamba", "attention", "width"),
    ],
)
def test_what_is_no_map_from_x_to_y_is_refused(make_model, ffn, message):
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_ffn(model, [1, 2], make_memory, ffn=ffn)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("widths", [(24, 24), (32, 24)])
def test_memories_of_other_widths_are_refused_in_torchs_layers(widths):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64), 2, enable_nested_tensor=False
    )
    with pytest.raises(ValueError, match=f"maps width {widths[0]} to {widths[1]}, .* 32 to 32"):
        replace_ffn(model, [1], lambda: pkm.ProductKeyMemory(*widths, num_subkeys=8, query_dim=8))
    assert isinstance(model.layers[0].linear1, nn.Linear)


class Returns(nn.Module):
    """An FFN of which nothing but what it returns tells that it is no map."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.map = kind, nn.Linear(32, 32)

    def forward(self, x):
        y = self.map(x)
        return {"pair": (y, None), "sum": y.sum(), "first": y[:, 0]}[self.kind]


@pytest.mark.parametrize("kind", ["pair", "sum", "first"])
def test_what_a_run_tells(kind):
    model = nn.ModuleList([nn.ModuleDict({"mlp": Returns(kind)})])
    with pytest.raises(ValueError, match=r"a Returns, which returns .* for x \[1, 2, 32\]"):
        replace_ffn(model, [1], make_memory)
    assert isinstance(model[0]["mlp"], Returns)


@pytest.mark.parametrize(
    ("make_model", "ffn"),
    [
        (lambda: hugging_face("mixtral", **MIXTURE), "mlp"),
        (lambda: hugging_face("gpt_neox"), "mlp"),
        (lambda: hugging_face("vit", image_size=8, patch_size=4), "mlp"),
    ],
    ids=["experts", "parallel", "vision"],
)
def test_other_models_that_call_it_as_a_map(make_model, ffn):
    model = make_model().eval()
    replace_ffn(model, [2], make_memory, ffn=ffn)
    with pkm.track_usage(model) as usages:
        if model.main_input_name == "input_ids":
            model(torch.randint(0, 64, (2, 5)))
        else:
            model(torch.randn(2, 3, 8, 8))
    assert next(iter(usages.values())).weight_sums.sum() == pytest.approx(2 * 2 * 5)


class Quantised(nn.Linear):
    """A map with weights of a dtype that nothing is trained in, and scales."""

    def __init__(self, dtype):
        super().__init__(32, 32, bias=False)
        self.weight = nn.Parameter(torch.zeros(32, 32).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32], ids=str)
def test_memories_beside_quantised_weights_keep_a_dtype_to_train_in(dtype, trained):
    model = Transformer(11, 32, 2, 2, 8, dtype=trained)
    model.layers[1].ffn = Quantised(dtype)
    (memory,) = replace_ffn(model, [2], make_memory, ffn="ffn")
    assert {p.dtype for p in memory.parameters()} == {trained}
    assert memory.values.unique().numel() > 200
    model(torch.randint(0, 11, (2, 8))).sum().backward()
    assert memory.values.grad.abs().sum() > 0


def test_a_memory_alone_among_quantised_weights_keeps_its_own_dtype():
    model = nn.ModuleList([nn.ModuleDict({"mlp": Quantised(torch.int8)})])
    (memory,) = replace_ffn(model, [1], lambda: make_memory(dtype=torch.bfloat16))
    assert memory.values.dtype == torch.bfloat16
