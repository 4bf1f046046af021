"""Small models of Hugging Face's kinds, randomly initialised, and a memory that fits them."""

import pytest

import pkm_triton as pkm


def make_memory(**changes):
    sizes = {"num_subkeys": 8, "heads": 2, "top_k": 4, "query_dim": 6}
    return pkm.ProductKeyMemory(32, **{**sizes, **changes})


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=16)
    )


HUGGING_FACE = pytest.mark.parametrize("make_model", [llama, gpt2])
