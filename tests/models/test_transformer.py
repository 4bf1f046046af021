import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pkm_triton as pkm
from pkm_triton.transformer import Transformer, memory_layers

SIZES = {"vocab_size": 11, "dim": 16, "num_layers": 3, "heads": 2, "context": 8}


def make_memory():
    return pkm.ProductKeyMemory(16, num_subkeys=8, heads=2, top_k=4, query_dim=6)


@pytest.mark.parametrize(
    ("num_layers", "n", "expected"),
    [
        (16, 2, (6, 12)),  # the paper's example
        (12, 1, (6,)),
        (12, 2, (4, 8)),
        (12, 3, (3, 6, 9)),
        (24, 1, (12,)),
        (4, 0, ()),
        (3, 3, (1, 2, 3)),
    ],
)
def test_memories_lie_at_regular_intervals(num_layers, n, expected):
    assert memory_layers(num_layers, n) == expected


def test_any_number_of_memories_fits_and_none_shares_a_layer():
    for num_layers in range(1, 30):
        for n in range(num_layers + 1):
            layers = memory_layers(num_layers, n)
            assert len(layers) == n
            assert list(layers) == sorted(set(layers) & set(range(1, num_layers + 1)))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("interleave", [False, True])
def test_a_block_is_the_papers_formula(norm, interleave):
    model = Transformer(
        **SIZES, memory_layers=[2], make_memory=make_memory, norm=norm, interleave=interleave
    ).eval()
    block = model.layers[1]
    x = torch.randn(2, 5, 16)

    def step(x, norm_module, f):
        return x + f(norm_module(x)) if norm == "pre" else norm_module(x + f(x))

    expected = step(x, block.attention_norm, block.attention)
    expected = step(expected, block.ffn_norm, block.ffn)
    if interleave:
        assert isinstance(block.ffn, nn.Sequential)
        expected = step(expected, block.memory_norm, block.memory)
        memory = block.memory
    else:
        assert block.memory is None
        memory = block.ffn
    assert isinstance(memory, pkm.ProductKeyMemory)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)
    assert [isinstance(layer.ffn, nn.Sequential) for layer in model.layers] == [
        True,
        interleave,
        True,
    ]


def test_attention_is_causal_softmax_attention():
    attention = Transformer(**SIZES).layers[0].attention
    x = torch.randn(2, 5, 16)
    query, key, value = (part.view(2, 5, 2, 8) for part in attention.inputs(x).chunk(3, dim=-1))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    scores.masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2)
    torch.testing.assert_close(attention(x), attention.output(out))


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_later_token_changes_no_earlier_logit(norm):
    model = Transformer(**SIZES, memory_layers=[1, 3], make_memory=make_memory, norm=norm).eval()
    tokens = torch.randint(0, 11, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    first, second = model(tokens), model(changed)
    assert first.shape == (2, 8, 11)
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=0, atol=0)
    assert (first[:, 5:] != second[:, 5:]).any(-1).all()


def test_positions_are_told_apart():
    model = Transformer(**SIZES).eval()
    logits = model(torch.full((1, 8), 3))
    assert (logits.diff(dim=1).abs().amax(-1) > 1e-4).all()


def test_every_parameter_gets_a_gradient():
    for norm in ("pre", "post"):
        model = Transformer(**SIZES, memory_layers=[2], make_memory=make_memory, norm=norm)
        tokens = torch.randint(0, 11, (4, 8))
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or "query_net.layers" in name, name


def test_by_default_the_memory_is_as_wide_as_the_model():
    with torch.device("meta"):
        model = Transformer(11, 32, 2, 2, 8, memory_layers=[1])
    memory = model.layers[0].ffn
    assert (memory.dim, memory.value_dim, memory.num_slots) == (32, 32, 512**2)


def test_dtype_and_device_reach_everything():
    model = Transformer(
        **SIZES,
        memory_layers=[2],
        make_memory=make_memory,
        dtype=torch.float64,
        device="meta",
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "dim is 16, but must be a multiple of the 3 heads"),
        ({"norm": "none"}, "norm is 'none', but must be 'pre' or 'post'"),
        ({"memory_layers": [4]}, "memory_layers names layer 4, but the model has 3 layers"),
        ({"memory_layers": [0]}, "memory_layers is 0"),
        ({"memory_layers": [2, 2]}, "only once"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**SIZES, **change})


def test_bad_calls():
    model = Transformer(**SIZES)
    for shape in ((8,), (1, 9)):
        with pytest.raises(ValueError, match=r"tokens must have shape \[B, T\] with T at most 8"):
            model(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="n is 4, but 3 layers hold at most 3"):
        memory_layers(3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"interleave": "yes"}, TypeError, "interleave is 'yes', but must be True or False"),
        ({"dropout": "x"}, ValueError, "dropout is 'x', but must lie in"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"device": "moon"}, ValueError, "device is 'moon'"),
        ({"memory_layers": 1}, TypeError, "memory_layers must be a sequence of integers"),
        ({"make_memory": 5}, TypeError, "make_memory must be a function, not int"),
        ({"make_memory": lambda: None}, TypeError, "make_memory must return a module"),
        (
            {"make_memory": lambda: pkm.ProductKeyMemory(16, num_subkeys=4, top_k=2, query_dim=4)},
            ValueError,
            "a memory from width 16 to 16, but both must be dim, 32",
        ),
    ],
)
def test_arguments_of_another_type(change, error, message):
    with pytest.raises(error, match=message):
        Transformer(11, 32, 3, 2, 8, **{"memory_layers": [1], **change})


@pytest.mark.parametrize("tokens", [torch.zeros(1, 4), [[1]]], ids=["floats", "list"])
def test_tokens_of_another_type(tokens):
    with pytest.raises(TypeError, match=r"tokens must be a tensor of torch.int64 or torch.int32"):
        Transformer(11, 32, 3, 2, 8)(tokens)
