"""Give a pretrained Llama two memories, and finetune it with Hugging Face's Trainer.

    python examples/finetune_llama.py --model meta-llama/Llama-3.2-1B --text my.txt

Without --model it makes a small one, and without --text it learns this file.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import pkm_triton as pkm
from pkm_triton.hf.trainers import MemoryTrainer


def small_model(folder: str) -> str:
    """Stands in for a pretrained model: one of bytes, saved as the hub's are."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Finetune, save, and load again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--text", default=__file__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--num-subkeys", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default="finetuned")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model or small_model(options.output))
    pkm.hf.add_memories(model, options.layers, num_subkeys=options.num_subkeys, sparse_grad=True)
    if options.model is None:
        tokens = torch.tensor(list(Path(options.text).read_bytes()))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tokens = tokenizer(Path(options.text).read_text(), return_tensors="pt").input_ids[0]
    pieces = [{"input_ids": piece, "labels": piece} for piece in tokens.split(64)[:-1]]
    if not pieces:
        parser.error(f"--text: {options.text} has {len(tokens)} tokens; more than 64 are needed")

    trainer = MemoryTrainer(
        model,
        TrainingArguments(
            options.output,
            max_steps=options.steps,
            learning_rate=5e-4,
            per_device_train_batch_size=8,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=pieces,
        value_learning_rate=2e-3,  # the scheduler scales both
    )
    result = trainer.train()
    trainer.save_model(options.output)

    again = pkm.hf.from_pretrained(options.output)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.cpu(), model.state_dict()[name].cpu())
    print(f"loss {result.training_loss:.3f} over {options.steps} steps; saved and loaded bitwise")


if __name__ == "__main__":
    main()
