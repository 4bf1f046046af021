import copy
import pickle

import pytest
import torch
from oracle import all_flat_scores, all_product_scores, gather
from torch import nn

import pkm_triton as pkm

LAYERS = [pkm.ProductKeyMemory, pkm.FlatKeyMemory]
SIZES = {"num_subkeys": 12, "heads": 3, "top_k": 5, "query_dim": 8}


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_the_paper(kind):
    """Equations 1 to 3 and section 3.3 by brute force in float64."""
    layer = kind(16, 10, **SIZES).double().eval()
    x = torch.randn(7, 16, dtype=torch.float64)
    query = layer.query_net(x)
    if kind is pkm.ProductKeyMemory:
        every = all_product_scores(query, layer.subkeys)
    else:
        every = all_flat_scores(query, layer.keys)
    scores, slots = every.topk(5)
    weights = scores.softmax(-1)
    expected = sum(gather(layer.values, slots[:, h], weights[:, h]) for h in range(3))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_shapes(kind):
    layer = kind(16, 10, **SIZES)
    assert layer(torch.randn(2, 4, 16)).shape == (2, 4, 10)
    weights, slots = layer.lookup(torch.randn(2, 4, 16))
    assert weights.shape == slots.shape == (2, 4, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3))
    assert layer.values.shape == (144, 10)
    assert kind(16, **SIZES)(torch.randn(3, 16)).shape == (3, 16)
    assert layer.eval()(torch.randn(16)).shape == (10,)
    assert layer(torch.randn(16), torch.tensor(True)).shape == (10,)
    assert layer(torch.randn(2, 0, 16)).shape == (2, 0, 10)
    assert layer(torch.randn(2, 0, 16), torch.ones(2, 0) > 0).shape == (2, 0, 10)


def test_training_with_no_tokens():
    layer = pkm.ProductKeyMemory(16, **SIZES)
    layer(torch.randn(0, 16)).sum().backward()
    assert layer.values.grad.count_nonzero() == 0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_gradients_in_float64(kind, norm):
    layer = kind(6, 4, num_subkeys=4, heads=2, top_k=3, query_dim=4, query_norm=norm).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    buffers = {name: value.clone() for name, value in layer.named_buffers()}
    assert torch.autograd.gradcheck(run, (x, *parameters))
    assert set(buffers) == {name for name, _ in layer.named_buffers()}


def test_only_touched_rows_get_gradients():
    layer = pkm.ProductKeyMemory(16, **SIZES)
    x = torch.randn(4, 16)
    _, slots = layer.lookup(x)
    layer(x).sum().backward()
    touched = layer.values.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(touched, slots.unique().long())


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_sparse_and_dense_gradients_agree(sparse_grad):
    layer = pkm.ProductKeyMemory(16, **SIZES, sparse_grad=sparse_grad)
    twin = pkm.ProductKeyMemory(16, **SIZES)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(9, 16)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert layer.values.grad.is_sparse == sparse_grad
    for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad, msg=name)


class TestMask:
    @pytest.mark.parametrize("norm", ["batch", "layer", None])
    @pytest.mark.parametrize("training", [True, False])
    def test_padding_leaves_no_trace(self, norm, training):
        """As if the padding had never been there: outputs, statistics and every gradient."""
        layer = pkm.ProductKeyMemory(16, **SIZES, query_norm=norm, sparse_grad=True).double()
        layer.train(training)
        twin = copy.deepcopy(layer)
        mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
        x = torch.randn(2, 4, 16, dtype=torch.float64)
        x[~mask] = torch.nan  # whatever padding holds
        x.requires_grad_()
        out = layer(x, mask)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        real = x.detach()[mask].requires_grad_()
        expected = twin(real)
        expected.backward(upstream[mask])
        torch.testing.assert_close(out[mask], expected)
        assert (out[~mask] == 0).all()
        torch.testing.assert_close(x.grad[mask], real.grad)
        assert (x.grad[~mask] == 0).all()
        for (name, one), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other, msg=name)
        for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad.to_dense(), other.grad.to_dense(), msg=name)
        assert torch.equal(
            layer.values.grad.coalesce().indices(), twin.values.grad.coalesce().indices()
        )

    def test_weights_of_padding_are_zero(self):
        layer = pkm.ProductKeyMemory(16, **SIZES)
        mask = torch.tensor([True, False, True])
        weights, slots = layer.lookup(torch.randn(3, 16), mask)
        assert (weights[1] == 0).all()
        usage = pkm.MemoryUsage(144)
        usage.update(slots, weights)
        assert usage.usage() == (slots[mask].unique().numel() / 144)

    def test_nothing_but_padding(self):
        layer = pkm.ProductKeyMemory(16, **SIZES)
        before = copy.deepcopy(dict(layer.named_buffers()))
        out = layer(torch.randn(3, 16), torch.zeros(3, dtype=torch.bool))
        out.sum().backward()
        assert (out == 0).all()
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, before[name]), name
        assert not any(p.grad.isnan().any() for p in layer.parameters())


class TestModule:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_state_dict_round_trip(self, kind):
        layer, twin = kind(16, **SIZES), kind(16, **SIZES)
        layer(torch.randn(20, 16))
        assert set(layer.state_dict()) == {
            "subkeys" if kind is pkm.ProductKeyMemory else "keys",
            "values",
            "query_net.layers.0.weight",
            "query_net.layers.0.bias",
            "query_net.norm.weight",
            "query_net.norm.bias",
            "query_net.norm.running_mean",
            "query_net.norm.running_var",
            "query_net.norm.num_batches_tracked",
        }
        twin.load_state_dict(layer.state_dict())
        x = torch.randn(4, 16)
        assert torch.equal(layer.eval()(x), twin.eval()(x))

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_copies(self, kind, copy_of):
        layer = kind(16, **SIZES).eval()
        twin = copy_of(layer)
        x = torch.randn(4, 16)
        assert torch.equal(layer(x), twin(x))
        assert twin.values is not layer.values

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("kind", LAYERS)
    def test_to_dtype(self, kind, dtype):
        layer = kind(16, **SIZES).to(dtype)
        out = layer(torch.randn(6, 16, dtype=dtype))
        out.sum().backward()
        assert out.dtype == dtype
        assert {p.grad.dtype for p in layer.parameters()} == {dtype}
        assert kind(16, **SIZES, dtype=dtype).values.dtype == dtype

    @pytest.mark.parametrize("kind", LAYERS)
    def test_meta_device(self, kind):
        layer = kind(16, **SIZES, device="meta")
        assert layer.values.is_meta
        layer = layer.to_empty(device="cpu")
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else 7)
        layer.reset_parameters()
        assert not any(t.isnan().any() for t in (*layer.parameters(), *layer.buffers()))
        assert layer.query_net.norm.num_batches_tracked == 0
        assert not layer(torch.randn(4, 16)).isnan().any()

    def test_initialisation(self):
        layer = pkm.ProductKeyMemory(32, 64, num_subkeys=64, query_dim=50)
        assert layer.subkeys.abs().max() <= 25**-0.5
        assert layer.subkeys.abs().max() > 0.99 * 25**-0.5
        assert abs(layer.values.std() * 8 - 1) < 0.01
        assert abs(layer.values.mean()) < 1e-3

    def test_shared_table(self):
        first, second = (pkm.ProductKeyMemory(16, **SIZES) for _ in range(2))
        second.values = first.values
        model = nn.Sequential(first, second)
        x = torch.randn(4, 16)
        model(x).sum().backward()
        both = first.values.grad.clone()
        middle = first(x)
        lone = nn.Parameter(first.values.detach().clone())
        second.values = lone
        first.zero_grad()
        second(middle).sum().backward()
        torch.testing.assert_close(both, first.values.grad + lone.grad)

    def test_says_what_it_is(self):
        text = repr(pkm.ProductKeyMemory(16, **SIZES, sparse_grad=True))
        for part in ("num_subkeys=12", "heads=3", "top_k=5", "num_slots=144", "sparse_grad=True"):
            assert part in text


def test_defaults_are_the_papers():
    """H 4, k 32, |K| 512², d_q 512 (paper 4.3)."""
    layer = pkm.ProductKeyMemory(8, device="meta")
    assert (layer.heads, layer.top_k, layer.num_slots, layer.query_dim) == (4, 32, 512**2, 512)
    assert isinstance(layer.query_net.norm, nn.BatchNorm1d)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query_dim": 7}, ValueError, "query_dim is 7, but must be even"),
        ({"top_k": 0}, ValueError, "top_k is 0"),
        ({"top_k": 145}, ValueError, "top_k is 145, but there are only 144 slots"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer"),
        ({"heads": 0}, ValueError, "heads is 0"),
        ({"num_subkeys": -1}, ValueError, "num_subkeys is -1"),
        ({"num_subkeys": 46341}, ValueError, "slots are int32"),
        ({"query_norm": "instance"}, ValueError, "query_norm is 'instance'"),
        ({"query_hidden": (0,)}, ValueError, "query_hidden is 0"),
        ({"value_dim": 0}, ValueError, "value_dim is 0"),
        ({"query_hidden": 5}, TypeError, "query_hidden must be a sequence of integers"),
        ({"query_hidden": "5"}, TypeError, "query_hidden must be a sequence of integers"),
        ({"query_hidden": (4.5,)}, TypeError, "query_hidden must be an integer"),
        ({"sparse_grad": 1}, ValueError, "sparse_grad is 1, but must be True, False or 'fact"),
        ({"dtype": torch.complex64}, TypeError, "dtype is torch.complex64, but must be None or"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"dtype": torch.bool}, TypeError, "dtype is torch.bool"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype is torch.float8_e4m3fn"),
        ({"dtype": "float32"}, TypeError, "dtype is 'float32'"),
        ({"device": "moon"}, ValueError, "device is 'moon', but must be one that this machine"),
        ({"device": 1.5}, ValueError, "device is 1.5"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_bad_construction(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(16, **{**SIZES, "device": "meta", **arguments})


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.randn(3, 15), None, ValueError, r"x must have shape \[..., 16\], not \[3, 15\]"),
        (torch.ones(3, 16).long(), None, TypeError, "x has dtype torch.int64"),
        ([1.0] * 16, None, TypeError, "x must be a tensor"),
        (torch.randn(3, 16), torch.ones(4) > 0, ValueError, r"mask must have shape \[3\]"),
        (torch.randn(3, 16), torch.ones(3), TypeError, "mask must be a bool tensor"),
        (torch.randn(3, 16), [True] * 3, TypeError, "mask must be a bool tensor"),
        (torch.randn(3, 16), torch.ones(3, device="meta") > 0, ValueError, "one device"),
        (torch.randn(3, 16).half(), None, TypeError, "x has dtype torch.float16, but must have"),
        (torch.randn(3, 16).double(), None, TypeError, "x has dtype torch.float64, but must have"),
        (torch.randn(3, 16, device="meta"), None, ValueError, "x is on meta, but must be on cpu"),
    ],
    ids=[
        "width",
        "integers",
        "list",
        "mask shape",
        "mask floats",
        "mask list",
        "mask device",
        "half",
        "double",
        "meta",
    ],
)
def test_bad_input(x, mask, error, message):
    layer = pkm.ProductKeyMemory(16, **SIZES)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message), pkm.track_usage(layer) as usages:
        layer(x, mask)
    assert usages[""].weight_sums.sum() == 0
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("output", [None, "linear", "gated"])
def test_values_of_another_dtype_than_the_rest(output):
    layer = pkm.ProductKeyMemory(16, **SIZES, output=output, dtype=torch.bfloat16)
    layer.values.data = layer.values.data.float()
    out = layer(torch.randn(3, 16).bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("output", [None, "linear", "gated"])
def test_keys_of_another_dtype_than_the_rest(output):
    layer = pkm.ProductKeyMemory(16, **SIZES, output=output, dtype=torch.bfloat16)
    layer.subkeys.data = layer.subkeys.data.float()
    assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16
    x = torch.randn(3, 16, dtype=torch.bfloat16, device="meta")
    assert layer.to("meta")(x).dtype == torch.bfloat16
    whole = pkm.ProductKeyMemory(16, **SIZES, output=output)
    assert whole.to("meta")(torch.randn(3, 16, device="meta")).dtype == torch.float32
    whole = whole.to_empty(device="cpu")
    whole.reset_parameters()
    with torch.autocast("cpu", torch.bfloat16):
        assert whole(torch.randn(3, 16)).dtype == (torch.bfloat16 if output else torch.float32)


def test_dtypes_under_autocast():
    layer = pkm.ProductKeyMemory(16, **SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.float32
        with pytest.raises(TypeError, match=r"x has dtype torch.float64"):
            layer(torch.randn(3, 16).double())
