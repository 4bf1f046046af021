import pytest
import torch

import pkm_triton as pkm
from pkm_triton.perf.measure import baselines
from pkm_triton.perf.measure.baselines import PackageMemory, TextbookMemory

SIZES = {"num_subkeys": 12, "heads": 3, "top_k": 5, "query_dim": 8}


def make_pair(keys, sparse_grad=False):
    """Our layer and the textbook's with the same parameters, float64."""
    kind = pkm.ProductKeyMemory if keys == "product" else pkm.FlatKeyMemory
    ours = kind(10, 6, **SIZES, sparse_grad=sparse_grad, dtype=torch.float64)
    theirs = TextbookMemory(
        ours.query_net, 6, keys=keys, **SIZES, sparse_grad=sparse_grad, dtype=torch.float64
    )
    with torch.no_grad():
        theirs.keys.copy_(ours.subkeys if keys == "product" else ours.keys)
        theirs.values.weight.copy_(ours.values)
    return ours, theirs


@pytest.fixture
def x():
    return torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keys", ["product", "flat"])
def test_textbook_finds_the_best_slots_of_all(keys, x):
    _, theirs = make_pair(keys)
    query = theirs.query_net(x)
    if keys == "product":
        first, second = query.unflatten(-1, (2, 4)).unbind(-2)
        a = torch.einsum("thd,hnd->thn", first, theirs.keys[:, 0])
        b = torch.einsum("thd,hnd->thn", second, theirs.keys[:, 1])
        scores = (a[..., :, None] + b[..., None, :]).flatten(-2)
    else:
        scores = torch.einsum("thd,hnd->thn", query, theirs.keys)
    best, slots = scores.topk(5)
    weights, found = theirs.lookup(query)
    torch.testing.assert_close(weights, best.softmax(-1))
    assert torch.equal(found, slots)


@pytest.mark.parametrize("keys", ["product", "flat"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_textbook_equals_our_layer_in_output_and_gradients(keys, sparse_grad, x):
    ours, theirs = make_pair(keys, sparse_grad)
    grads = []
    for layer, key_name, value_name in (
        (ours, "subkeys" if keys == "product" else "keys", "values"),
        (theirs, "keys", "values.weight"),
    ):
        layer.train()
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        output = layer(leaf)
        output.square().sum().backward()
        values = layer.get_parameter(value_name).grad
        assert values.is_sparse == sparse_grad
        grads.append(
            {
                "output": output.detach(),
                "x": leaf.grad,
                "keys": layer.get_parameter(key_name).grad,
                "values": values.to_dense(),
                "query": layer.query_net.layers[0].weight.grad.clone(),
            }
        )
    for name, expected in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], expected, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_flat_keys_in_many_chunks_find_the_same(monkeypatch, x):
    _, theirs = make_pair("flat")
    query = theirs.query_net(x)
    weights, slots = theirs.lookup(query)
    monkeypatch.setattr(baselines, "FLAT_CHUNK_BYTES", 4 * 7 * 13)  # 13 keys a chunk
    chunked_weights, chunked_slots = theirs.lookup(query)
    torch.testing.assert_close(chunked_weights, weights)
    assert torch.equal(chunked_slots, slots)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_the_package_equals_the_textbook_with_its_parameters(sparse_grad, x):
    pytest.importorskip("product_key_memory")
    package = PackageMemory(10, **SIZES, sparse_grad=sparse_grad, dtype=torch.float64)

    class Query(torch.nn.Module):
        """The package's projection: the halves come first, then the heads."""

        def forward(self, x):
            halves = package.layer.to_queries(x).unflatten(-1, (2, 3, 4))
            return package.layer.norm(halves).transpose(-3, -2).flatten(-2)

    textbook = TextbookMemory(Query(), 10, keys="product", **SIZES, dtype=torch.float64)
    with torch.no_grad():
        textbook.keys.copy_(package.layer.keys.transpose(1, 2))
        textbook.values.weight.copy_(package.layer.values.weight)
    output = package(x)
    torch.testing.assert_close(output, textbook(x))
    output.sum().backward()
    assert package.layer.values.weight.grad.is_sparse == sparse_grad
