"""Train a memory whole beside LoRA on a frozen model, with PEFT.

python examples/lora_beside_memories.py
"""

import argparse

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pkm_triton as pkm


def build() -> LlamaForCausalLM:
    """A small Llama with one memory: in practice pkm.hf.add_memories on a pretrained one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    pkm.hf.add_memories(model, [2], num_subkeys=32, query_dim=64)
    return model


def main() -> None:
    """Train, save the adapter, and load it onto the same model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="adapter")
    options = parser.parse_args()

    # Low-rank updates of the attention, and a trained copy of the memory of layer 2 (counted from
    # 0 in module names, so layers.1).
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["layers.1.mlp"]
    )
    model = peft.get_peft_model(build(), config)
    model.print_trainable_parameters()
    optimiser = torch.optim.AdamW(pkm.param_groups(model, lr=1e-3, value_lr=1e-2))
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(options.steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.save_pretrained(options.output)  # the low ranks and the memory, nothing of the model

    again = peft.PeftModel.from_pretrained(build(), options.output)
    with torch.no_grad():
        same = torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert same
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the adapter was saved and loaded bitwise")


if __name__ == "__main__":
    main()
