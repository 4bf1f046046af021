"""Imported again, as notebooks and reloaders do, the package goes on working, old objects too."""

import subprocess
import sys

import pytest

AGAIN = """
import importlib, sys, torch
import pkm_triton as old
import pkm_triton.ops

def forget():
    for name in list(sys.modules):
        if name.startswith("pkm_triton"):
            del sys.modules[name]

def reload():
    for name, module in sorted(sys.modules.items()):
        if name.startswith("pkm_triton"):
            importlib.reload(module)

sizes = dict(num_subkeys=8, heads=2, top_k=3, query_dim=8)
before = [old.ProductKeyMemory(8, **sizes, sparse_grad=kind) for kind in (False, True, "factored")]
x = torch.randn(5, 8)
for again in (forget, reload):
    again()
    import pkm_triton as new
    import pkm_triton.ops
    for layer in before:
        fresh = new.ProductKeyMemory(8, **sizes, sparse_grad=layer.sparse_grad)
        fresh.load_state_dict(layer.state_dict())
        for each in (layer, fresh):
            out = each(x)
            out.sum().backward()
            assert each.values.grad is not None
        assert torch.equal(layer.eval()(x), fresh.eval()(x))
        layer.train()
        layer.zero_grad()
        if layer.sparse_grad != "factored":  # that breaks the graph
            compiled = torch.compile(fresh, backend="aot_eager", fullgraph=True)
            compiled(x).sum().backward()
            assert fresh.values.grad.is_sparse == layer.sparse_grad
print("fine")
"""


@pytest.mark.slow
def test_imported_again():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AGAIN], capture_output=True, text=True, check=False
    )
    assert done.stdout == "fine\n", done.stderr
