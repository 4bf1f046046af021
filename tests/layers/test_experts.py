"""The mixture of tiny experts (PEER) against the paper's formula, and what it saves."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import pkm_triton as pkm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning:torch")

SIZES = {"num_subkeys": 5, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": None}
DOUBLE = torch.float64
ACTIVATIONS = {
    "gelu": lambda z: z / 2 * (1 + np.vectorize(math.erf)(z / np.sqrt(2))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
}
FORMS = list(itertools.product(ACTIVATIONS, ("softmax", "relu")))


def by_the_paper(layer, x):
    """He 2024, section 2: the best experts of each head by their scores, and the sum over them."""
    net = layer.query_net.layers[0]
    subkeys, u, v = (p.detach().numpy() for p in (layer.subkeys, layer.inputs, layer.values))
    out = np.zeros((x.shape[0], layer.value_dim))
    for t, token in enumerate(x.numpy()):
        query = (net.weight.detach().numpy() @ token + net.bias.detach().numpy()).reshape(2, 2, 2)
        for head in range(2):
            scores = [
                query[head, 0] @ subkeys[head, 0, i] + query[head, 1] @ subkeys[head, 1, j]
                for i in range(5)
                for j in range(5)
            ]
            best = np.argsort(scores)[::-1][:3]
            score = np.array(scores)[best]
            if layer.gate == "softmax":
                gates = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
            else:
                gates = np.maximum(score, 0)
            for expert, gate in zip(best, gates, strict=True):
                out[t] += gate * ACTIVATIONS[layer.activation](u[expert] @ token) * v[expert]
    return torch.from_numpy(out)


@pytest.mark.parametrize(("activation", "gate"), FORMS)
def test_equals_the_papers_formula(activation, gate):
    layer = pkm.ProductKeyExperts(
        6, 4, **SIZES, activation=activation, gate=gate, dtype=DOUBLE
    )  # fmt: skip
    x = torch.randn(7, 6, dtype=DOUBLE)
    torch.testing.assert_close(layer(x), by_the_paper(layer, x))
    shaped = layer(x[:6].view(2, 3, 6))
    torch.testing.assert_close(shaped, layer(x)[:6].view(2, 3, 4))


@pytest.mark.parametrize(("activation", "gate"), FORMS)
def test_gradients(activation, gate):
    layer = pkm.ProductKeyExperts(4, **SIZES, activation=activation, gate=gate, dtype=DOUBLE)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)

    def run(x, *tensors):
        return functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert gradcheck(run, (x, *parameters.values()))
    # Second derivatives of relu's square jump at 0, which no input here is near.
    assert gradgradcheck(lambda x: run(x, *parameters.values()), (x,))
    tangent, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        expected = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    found = jvp(layer, (x.detach(),), (tangent,))[1]
    torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sparse_grad", [False, True, "factored"])
def test_forms_of_gradients_and_a_step(sparse_grad):
    layer = pkm.ProductKeyExperts(4, **SIZES, sparse_grad=sparse_grad)
    other = pkm.ProductKeyExperts(4, **SIZES)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(6, 4)
    for each in (layer, other):
        optimiser = pkm.optim.SparseAdam(pkm.param_groups(each, 0.01, 0.1), eps=1e-3)
        each(x).square().sum().backward()
        optimiser.step()
    for (name, one), same in zip(layer.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), same.grad, msg=name)
    rows = layer.lookup(x)[1].unique().long()
    for one, same in zip(layer.tables, other.tables, strict=True):
        assert one.grad.is_sparse == (sparse_grad is True)
        torch.testing.assert_close(one[rows], same[rows])
    groups = pkm.param_groups(layer)
    assert {id(p) for p in groups[1]["params"]} == {id(layer.inputs), id(layer.values)}


def test_per_sample_gradients():
    layer = pkm.ProductKeyExperts(4, **SIZES, dtype=DOUBLE)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 4, dtype=DOUBLE)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, msg=name)


def test_saves_12_bytes_a_read_and_x():
    layer = pkm.ProductKeyExperts(64, num_subkeys=32, heads=4, top_k=16, query_dim=16)
    x, parameters = torch.randn(100, 64), {p.data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    query = 4 * 16
    network = 100 * 4 * (64 + 2 * query) + 16 * query
    assert sum(saved.values()) <= 100 * 12 * 4 * 16 + network


def test_padding():
    layer = pkm.ProductKeyExperts(4, **{**SIZES, "query_norm": "batch"})
    x, mask = torch.randn(6, 4), torch.tensor([True, True, False, True, False, True])
    dirty = x.clone()
    dirty[~mask] = torch.nan
    out = layer(dirty.requires_grad_(), mask)
    assert not out[~mask].any()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_saved_and_loaded(tmp_path):
    model = nn.Sequential(pkm.ProductKeyExperts(4, **SIZES, activation="silu", gate="relu"))
    pkm.save_with_memory(model, tmp_path / "model.pt")
    loaded = pkm.load_with_memory(nn.Sequential(nn.Identity()), tmp_path / "model.pt")
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].arguments() == model[0].arguments()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled():
    torch.compiler.reset()
    layer = pkm.ProductKeyExperts(4, **SIZES)
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"activation": "tanh"},
            "activation is 'tanh', but must be one of 'gelu', 'silu'",
        ),
        ({"gate": None}, "gate is None, but must be one of 'softmax', 'relu'"),
        ({"top_k": 26}, "top_k is 26"),
    ],
)
def test_unknown_options(option, message):
    with pytest.raises(ValueError, match=message):
        pkm.ProductKeyExperts(4, **{**SIZES, **option})
