"""Imported again, as notebooks and reloaders do, the package goes on working, old objects too."""

import subprocess
import sys

import pytest

FORGET_AND_RELOAD = """
import importlib, sys

def forget():
    for name in list(sys.modules):
        if name.startswith("pkm_triton"):
            del sys.modules[name]

def reload(package="pkm_triton"):
    for name, module in sorted(sys.modules.items()):
        if name.startswith(package):
            importlib.reload(module)
"""

AGAIN = """
import torch
import pkm_triton as old
import pkm_triton.ops

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


def test_a_plain_reload_changes_nothing_for_layers_made_before(tmp_path):
    again = f"""
import importlib, torch
import pkm_triton as pkm
model = torch.nn.Sequential(pkm.ProductKeyMemory(8, num_subkeys=8, top_k=3, query_dim=8))
pkm = importlib.reload(pkm)
assert isinstance(model[0], pkm.ProductKeyMemory)
rest, values = pkm.param_groups(model)
assert values["params"] == [model[0].values]
with pkm.track_usage(model) as usages:
    model(torch.randn(5, 8))
assert usages["0"].usage() > 0
pkm.save_with_memory(model, {str(tmp_path / "model.pt")!r})
loaded = torch.nn.Sequential(torch.nn.Identity())
pkm.load_with_memory(loaded, {str(tmp_path / "model.pt")!r})
assert torch.equal(loaded[0].values, model[0].values)
"""
    done = subprocess.run(
        [sys.executable, "-c", again], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_imported_again():
    done = subprocess.run(
        [sys.executable, "-W", "error:Warning only once", "-c", FORGET_AND_RELOAD + AGAIN],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


HUGGING_FACE = """
import transformers
import pkm_triton.hf

for step in (forget, lambda: reload("pkm_triton.hf")):
    step()
    import pkm_triton as pkm
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    pkm.hf.add_memories(model, [1], num_subkeys=4, top_k=2, query_dim=4)
    model.save_pretrained(sys.argv[1])
    for loaded in (
        pkm.hf.from_pretrained(sys.argv[1]),
        transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    ):
        assert type(loaded.model.layers[0].mlp) is pkm.ProductKeyMemory
print("fine")
"""


def test_what_transformers_knows_is_the_last_that_was_imported(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORGET_AND_RELOAD + HUGGING_FACE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr
