"""Read the memory of an XLM checkpoint, use it, and write it back.

    python examples/convert_checkpoint.py --checkpoint old.pth --prefix memories.4_after. --top-k 32

Without --checkpoint it writes one of XLM's layout first. `from_meta` and `from_lucidrains` read
those of facebookresearch/memory and of the package product-key-memory.
"""

import argparse

import torch

import pkm_triton as pkm
from pkm_triton import convert


def main() -> None:
    """Convert there and back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint")
    parser.add_argument("--prefix", default="memories.4_after.")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--output", default="xlm.pth")
    options = parser.parse_args()

    path = options.checkpoint or options.output
    if options.checkpoint is None:
        made = pkm.ProductKeyMemory(64, num_subkeys=32, query_dim=64, top_k=options.top_k)
        torch.save({"model": convert.to_xlm(made, options.prefix)}, path)

    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    ours = {name: t for name, t in state.items() if name.startswith(options.prefix)}
    memory = convert.from_xlm(ours, options.top_k, options.prefix).eval()
    print(memory)
    with torch.no_grad():
        out = memory(torch.randn(4, memory.dim))
    again = convert.to_xlm(memory, options.prefix)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())
    print(f"4 tokens give {list(out.shape)}; written back, it is what was read")


if __name__ == "__main__":
    main()
