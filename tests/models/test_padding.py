"""The mask of the attention beside a memory keeps padding out of the memory's batch statistics."""

import copy
import pickle

import pytest
import torch
from small_models import gpt2, llama, make_memory
from torch import nn

import pkm_triton as pkm
from pkm_triton._padding import real_tokens

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])


def bert():
    """An encoder whose feed-forward block is one module."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ModernBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return transformers.ModernBertModel(config)


def outputs(model, ids, mask):
    out = model(input_ids=ids, attention_mask=mask)
    return out[0]


def prepared(make_model, attention):
    model = make_model()
    model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "out_drop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    memories = pkm.replace_ffn(model, [2, 3], make_memory)
    return model.train(), memories


@pytest.mark.parametrize("make_model", [llama, gpt2, bert])
@pytest.mark.parametrize(
    ("attention", "side", "reentrant"),
    [
        ("eager", "right", None),
        ("eager", "left", None),
        ("sdpa", "right", None),
        ("sdpa", "left", None),
        ("sdpa", "right", False),
        ("sdpa", "right", True),
    ],
)
def test_what_padding_holds_changes_nothing(make_model, attention, side, reentrant):
    model, memories = prepared(make_model, attention)
    if reentrant is not None:
        older = "gradient_checkpointing_enable"  # deprecated in transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, older)
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    mask = MASK if side == "right" else MASK.flip(1)
    ids = torch.randint(3, 64, MASK.shape)
    other = torch.where(mask == 1, ids, torch.randint(3, 64, MASK.shape))
    assert not torch.equal(ids, other)
    twin = copy.deepcopy(model)
    results = []
    for each, tokens in ((model, ids), (twin, other)):
        with pkm.track_usage(each) as usages:
            out = outputs(each, tokens, mask)
            (out * mask.unsqueeze(-1)).square().mean().backward()
        for usage in usages.values():
            assert usage.weight_sums.sum() == pytest.approx(2 * MASK.sum().item())
        results.append(out[mask == 1])
    torch.testing.assert_close(*results)
    for (name, one), second in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, second, msg=name)
    for memory in memories:
        assert memory.query_net.norm.num_batches_tracked == 1
        assert memory.layer_mask is None
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "embed" not in name and "wte" not in name:
            torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_torchs_own_layers(batch_first, kind):
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    (memory,) = pkm.replace_ffn(model, [2], make_memory)
    padding = MASK == 0
    given = padding if kind == torch.bool else torch.zeros(3, 6).masked_fill(padding, -torch.inf)
    results = []
    for fill in (0.0, 5.0):
        memory.query_net.norm.reset_running_stats()
        x = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(0))
        x[padding] = fill
        x = x if batch_first else x.transpose(0, 1)
        out = model(x, src_key_padding_mask=given)
        out = out if batch_first else out.transpose(0, 1)
        results.append((out[~padding], memory.query_net.norm.running_mean.clone()))
    torch.testing.assert_close(*results)


# Of torch, where it traces a Function.
@pytest.mark.filterwarnings(r"ignore:::torch\.(_inductor|jit|_dynamo)")
def test_compiled_whole():
    model, memories = prepared(llama, "sdpa")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin.model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(3, 64, MASK.shape)
    wide = torch.ones(3, 1, 6, 6).tril().bool() & (MASK[:, None, None, :] == 1)
    expected = model.model(input_ids=ids, attention_mask=wide, use_cache=False)
    out = compiled(input_ids=ids, attention_mask=wide, use_cache=False)
    torch.testing.assert_close(out[0][MASK == 1], expected[0][MASK == 1])
    norm = twin.model.layers[1].mlp.query_net.norm
    torch.testing.assert_close(norm.running_mean, memories[0].query_net.norm.running_mean)


def test_copies_hand_on_to_their_own_memory():
    model, (memory, _) = prepared(llama, "sdpa")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = memory.query_net.norm.running_mean.clone()
        copied = twin.model.layers[1].mlp
        with pkm.track_usage(twin) as usages:
            outputs(twin, torch.randint(3, 64, MASK.shape), MASK)
        assert next(iter(usages.values())).weight_sums.sum() == pytest.approx(2 * 11)
        assert copied is not memory
        assert torch.equal(memory.query_net.norm.running_mean, before)
        assert memory.layer_mask is None


def test_a_memory_that_is_replaced_again():
    model, _ = prepared(llama, "sdpa")
    (memory,) = pkm.replace_ffn(model, [2], make_memory)
    assert len(model.model.layers[1].self_attn._forward_pre_hooks) == 1
    with pkm.track_usage(memory) as usages:
        outputs(model, torch.randint(3, 64, MASK.shape), MASK)
    assert usages[""].weight_sums.sum() == pytest.approx(2 * 11)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_copies_that_adapters_put_in_the_place_of_a_memory():
    peft = pytest.importorskip("peft")
    model, _ = prepared(llama, "sdpa")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1.mlp"])
    adapted = peft.get_peft_model(model, config)
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad and "values" in n]
    assert len(trained) == 1
    with pkm.track_usage(adapted) as usages:
        outputs(adapted, torch.randint(3, 64, MASK.shape), MASK)
    counted = [round(u.weight_sums.sum().item(), 3) for u in usages.values()]
    assert sorted(counted) == [0, 22, 22]  # the original is out of use


def test_copies_of_data_parallelism_are_warned_of():
    model, _ = prepared(llama, "sdpa")
    model.model.layers[1].self_attn._is_replica = True  # as torch marks its copies
    with pytest.warns(UserWarning, match=r"not left out .*nn.DataParallel calls"):
        outputs(model, torch.randint(3, 64, MASK.shape), MASK)


def test_generation_with_a_cache():
    model, _ = prepared(llama, "sdpa")
    model.eval()
    ids = torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False)
    assert torch.equal(both[0, 6:], alone[0, 4:])


def real(mask, *tokens, training=False):
    return real_tokens(mask, torch.Size(tokens), training=training)


def test_masks_that_do_not_tell():
    assert real(None, 2, 4) is None
    assert real(torch.ones(2, 1, 4, 9) > 0, 2, 4) is None  # a cache with room after the tokens
    assert real(torch.ones(2, 3), 2, 4) is None
    assert real(torch.ones(2, 1, 3, 4) > 0, 2, 4) is None
    assert real(torch.ones(2, 1, 4, 4) > 0, 8) is None
    assert real(object(), 2, 4) is None
    with pytest.warns(UserWarning, match="padding is not left out of .* the mask is a object"):
        assert real(object(), 2, 4, training=True) is None


def test_tokens_after_a_prefix():
    longer = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(real(longer, 2, 4), longer[:, 1:] == 1)
    square = torch.ones(5, 5).tril()[1:].bool() & (longer[:, None, None, :] == 1)
    assert torch.equal(real(square, 2, 4, training=True), longer[:, 1:] == 1)
    added = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    assert torch.equal(real(added, 2, 4, training=True), longer[:, 1:] == 1)


def test_masks_of_several_kinds():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = mask == 1
    assert torch.equal(real(mask, 2, 3), expected)
    assert torch.equal(real(mask.float(), 2, 3), expected)
    assert torch.equal(real(expected[:, None, None, :], 2, 3), expected)  # each token sees the same
    assert torch.equal(real(expected[:, None, :].expand(2, 3, 3), 2, 3), expected)  # without heads
    assert real(torch.ones(1, 1, 3, 3).tril() > 0, 2, 3).all()  # one mask for the batch
