"""The norms of the query network: torch's results, on any number of threads, in every mode."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pkm_triton as pkm
from pkm_triton.batch_norm import QueryBatchNorm, QueryLayerNorm

SIZES = {"num_subkeys": 8, "heads": 2, "top_k": 3, "query_dim": 8}
KINDS = pytest.mark.parametrize("kind", ["batch", "layer"])


def pair(kind, features, dtype=torch.float64):
    """Ours and torch's, with the same parameters and statistics."""
    ours = (QueryBatchNorm if kind == "batch" else QueryLayerNorm)(features).to(dtype)
    for tensor in (*ours.parameters(), *ours.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    torchs = (nn.BatchNorm1d if kind == "batch" else nn.LayerNorm)(features).to(dtype)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


@KINDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_equals_torchs(kind, training, momentum):
    ours, torchs = pair(kind, 10)
    for norm in (ours, torchs):
        norm.train(training)
        norm.momentum = momentum
    for rows in (150, 2, 64):  # more than the rows gone through at a time, and as many
        x = (3 + torch.randn(rows, 10, dtype=torch.float64)).requires_grad_()
        grad = torch.randn_like(x)
        results = []
        for norm in (ours, torchs):
            norm.zero_grad()
            out = norm(x)
            out.backward(grad)
            results.append((out, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()))
            x.grad = None
        torch.testing.assert_close(*results)


@KINDS
def test_half_precision_is_at_least_as_good_as_torchs(kind):
    ours, torchs = pair(kind, 64, torch.bfloat16)
    x = torch.randn(100, 64, dtype=torch.bfloat16)
    exact = copy.deepcopy(torchs).double()(x.double())
    errors = [(norm(x).double() - exact).abs().max() for norm in (ours, torchs)]
    assert errors[0] <= 2 * errors[1]
    assert ours(x).dtype == torch.bfloat16


# Of torch, on the first use of forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_higher_orders_and_forward_mode(masked, training):
    norm, _ = pair("batch", 4)
    norm.train(training)
    mask = torch.tensor([True, True, False, True, False, True]) if masked else None
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))

    assert torch.autograd.gradcheck(
        run, (x, norm.weight, norm.bias), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(run, (x, norm.weight, norm.bias))


def bits(kind, masked, training, threads):
    """Output, statistics and every gradient of a norm on so many threads."""
    torch.manual_seed(0)
    norm, _ = pair(kind, 132, torch.float32)
    norm.train(training)
    x, grad = torch.randn(700, 132, requires_grad=True), torch.randn(700, 132)
    mask = (torch.rand(700) > 0.3,) if masked else ()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = norm(x, *mask)
        out.backward(grad)
    finally:
        torch.set_num_threads(before)
    return [out, x.grad, *norm.buffers(), *(p.grad for p in norm.parameters())]


@pytest.mark.parametrize(("kind", "masked"), [("batch", False), ("batch", True), ("layer", False)])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_bits_on_any_number_of_threads(kind, masked, training):
    """The query network's matrix products are the BLAS library's: here are the norms alone."""
    one = bits(kind, masked, training, 1)
    for threads in (2, 3):
        for first, second in zip(one, bits(kind, masked, training, threads), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["own", "torch", "synchronised"])
def test_checkpointing_counts_a_batch_once(reentrant, masked, kind):
    layer = pkm.ProductKeyMemory(16, **SIZES)
    if kind == "torch":
        layer.query_net.norm = nn.BatchNorm1d(16)
    elif kind == "synchronised":
        pkm.synchronise_batch_norm(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(20, 16, requires_grad=True)
    mask = torch.rand(20) > 0.4 if masked else None
    grads = []
    with pkm.track_usage(layer) as once, pkm.track_usage(twin) as plain:
        out = checkpoint(layer, x, mask, use_reentrant=reentrant)
        out.square().sum().backward()
        grads.append(x.grad)
        x.grad = None
        twin(x, mask).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert layer.query_net.norm.num_batches_tracked == 1
    for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(once[""].weight_sums, plain[""].weight_sums)
    assert once[""].weight_sums.sum() == pytest.approx(2 * (20 if mask is None else mask.sum()))


@pytest.mark.parametrize("mask", [None, torch.tensor([True])], ids=["plain", "mask"])
def test_one_row_becomes_the_bias_and_is_not_counted(mask):
    norm = QueryBatchNorm(4)
    nn.init.normal_(norm.bias)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, 4, requires_grad=True)
    out = norm(x, mask)
    out.sum().backward()
    torch.testing.assert_close(out[0], norm.bias)
    assert (x.grad == 0).all()
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Of torch, where it traces a Function.
@pytest.mark.filterwarnings(r"ignore:::torch\.(_inductor|jit|_dynamo)")
def test_compiled_whole_it_trains_as_eager():
    layer = pkm.ProductKeyMemory(16, **SIZES)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(20, 16)
    for mask in (None, torch.rand(20) > 0.4):
        torch.testing.assert_close(compiled(x, mask), layer(x, mask))
    for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)
