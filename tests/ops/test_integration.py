"""The ops and layers inside PyTorch's own machinery: compile, export, autocast, checkpointing."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pkm_triton as pkm

SIZES = {"num_subkeys": 12, "heads": 3, "top_k": 5, "query_dim": 8}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        # The compiler's own imports warn; what this project does under it must not.
        warnings.filterwarnings("ignore", module=r"torch\.(_inductor|jit|_dynamo)")
        yield


def compiled(module, **options):
    return torch.compile(module, fullgraph=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_compile_whole_layer(kind, sparse_grad):
    layer = kind(16, **SIZES, sparse_grad=sparse_grad)
    x = torch.randn(9, 16)
    layer(x).square().sum().backward()
    expected = {name: p.grad.to_dense() for name, p in layer.named_parameters()}
    layer.zero_grad()
    compiled(layer)(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.to_dense(), expected[name], msg=name)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_sparse_gradient_breaks_no_graph(fullgraph):
    """Compiled without `fullgraph` either: how many rows are read depends on the data."""
    layer = pkm.ProductKeyMemory(16, **SIZES, sparse_grad=True, query_norm="layer")
    torch._dynamo.utils.counters.clear()
    step = torch.compile(layer, fullgraph=fullgraph, backend="aot_eager")
    for tokens in (9, 9, 9):
        x = torch.randn(tokens, 16)
        step(x).square().sum().backward()
        compiled_grad, layer.values.grad = layer.values.grad, None
        layer(x).square().sum().backward()
        torch.testing.assert_close(compiled_grad.to_dense(), layer.values.grad.to_dense())
        layer.values.grad = None
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["gather", "sample", "scatter"])
def test_compile_the_ops_on_a_table(name):
    slots = torch.randint(0, 9, (4, 5))
    values, weights, x = torch.randn(9, 3), torch.rand(4, 5), torch.randn(4, 3)
    function, inputs = {
        "gather": (lambda v, w: pkm.gather_values(v, slots, w), (values, weights)),
        "sample": (lambda v, x: pkm.sample_values(v, slots, x), (values, x)),
        "scatter": (lambda w, x: pkm.scatter_values(slots, w, x, 9), (weights, x)),
    }[name]
    grads = []
    for run in (function, compiled(function, backend="aot_eager")):
        args = [a.clone().requires_grad_() for a in inputs]
        grads.append(torch.autograd.grad(run(*args).square().sum(), args))
        torch.testing.assert_close(run(*inputs), function(*inputs))
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_compile_with_a_mask():
    layer = pkm.ProductKeyMemory(16, **SIZES)
    x, mask = torch.randn(9, 16), torch.rand(9) > 0.3
    torch.testing.assert_close(compiled(layer)(x, mask), layer(x, mask))


@pytest.mark.parametrize("training", [True, False])
def test_no_recompile_when_the_number_of_tokens_changes(training):
    layer = pkm.ProductKeyMemory(16, **SIZES, query_norm="layer").train(training)
    step = compiled(layer, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (4, 9, 33, 100):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(step(x), layer(x))


@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_export(kind):
    layer = kind(16, **SIZES).eval()
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (torch.randn(4, 16),), dynamic_shapes=({0: tokens},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("pkm_triton.gather_values") for target in targets)
    x = torch.randn(11, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_autocast(sparse_grad):
    layer = pkm.ProductKeyMemory(64, **SIZES, sparse_grad=sparse_grad)
    x = torch.randn(20, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query = layer.query_net(x)
        scores, slots = pkm.product_key_topk(query, layer.subkeys, 5)
        out = layer(x)
        out.sum().backward()
    # Scores of bfloat16 queries are accumulated in float32 all the same.
    exact, _ = pkm.product_key_topk(query.float(), layer.subkeys, 5)
    assert torch.equal(scores, exact)
    assert out.dtype == layer.values.grad.dtype == torch.float32
    assert not any(p.grad.to_dense().isnan().any() for p in layer.parameters())
    assert slots.dtype == torch.int32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    layer = pkm.ProductKeyMemory(16, **SIZES, query_norm="layer")
    x = torch.randn(9, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_inference_mode():
    layer = pkm.ProductKeyMemory(16, **SIZES).eval()
    x = torch.randn(9, 16)
    with torch.inference_mode():
        out = layer(x)
    assert torch.equal(out, layer(x))


def test_saved_for_backward_is_small():
    """Indices of 4 bytes, weights and the query; nothing a candidate, nothing [T, R, d_v]."""
    layer = pkm.ProductKeyMemory(64, num_subkeys=32, heads=4, top_k=8, query_dim=16)
    x, parameters = torch.randn(100, 64), {p.data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    reads, query = 4 * 8, 4 * 16
    own = 100 * (4 * reads + 4 * reads + 4 * query)  # slots, weights, query
    network = 100 * 4 * (64 + query)  # what the linear map and the batch norm save
    assert sum(saved.values()) <= own + network + 4 * 4 * query
