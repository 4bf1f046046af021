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
    assert next(iter(usages.values())).weight_sums.sum() == pytest.approx(2 * 5 * 2)
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
