"""Export a model with a memory, and run the exported program, compiled or not.

python examples/export_model.py --compile
"""

import argparse

import torch

import pkm_triton as pkm


def main() -> None:
    """Export for any number of tokens, save, load, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="model.pt2")
    parser.add_argument("--compile", action="store_true", help="ahead of time (AOTInductor)")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), pkm.ProductKeyMemory(64, num_subkeys=32, query_dim=64)
    ).eval()
    x = torch.randn(8, 32)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
        if options.compile:
            # The library it makes calls pkm_triton's operators: import pkm_triton.ops to load it.
            torch._inductor.aoti_compile_and_package(program, package_path=options.output)
            run = torch._inductor.aoti_load_package(options.output)
        else:
            torch.export.save(program, options.output)
            run = torch.export.load(options.output).module()
        for count in (8, 3):
            x = torch.randn(count, 32)
            torch.testing.assert_close(run(x), model(x))
    print(f"{options.output} gives what the model gives, for 8 tokens and for 3")


if __name__ == "__main__":
    main()
