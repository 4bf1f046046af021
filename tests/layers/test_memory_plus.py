"""The options of Memory+ (Berges et al. 2024) against its formulas, and pools that layers share."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pkm_triton as pkm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning:torch")

SIZES = {"num_subkeys": 5, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": None}
DOUBLE = torch.float64


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def array(tensor):
    return tensor.detach().numpy()


@pytest.mark.parametrize("output", ["gated", "linear"])
def test_equals_the_papers_formula(output):
    """y = W_v((sum of w V) * silu(W_s x)), or W_v of the sum."""
    layer = pkm.ProductKeyMemory(6, 3, **SIZES, output=output, dtype=DOUBLE)
    x = torch.randn(7, 6, dtype=DOUBLE)
    weights, slots = layer.lookup(x)
    rows = array(layer.values)[slots.flatten(1).numpy()]
    m = np.einsum("tr,trd->td", array(weights.flatten(1)), rows)
    w_v = layer.output.value_proj
    if output == "gated":
        w_s = layer.output.gate_proj
        z = x.numpy() @ array(w_s.weight).T + array(w_s.bias)
        m = m * z / (1 + np.exp(-z))
    y = m @ array(w_v.weight).T + array(w_v.bias)
    torch.testing.assert_close(layer(x), torch.from_numpy(y))
    assert layer(x.view(1, 7, 6)).shape == (1, 7, 6)


@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory, pkm.ProductKeyExperts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_is_as_training(kind, dtype):
    """Without a gradient one operator gathers and takes the gate; same bits on the reference."""
    layer = kind(6, 3, **SIZES, output="gated", dtype=dtype).eval()
    x = torch.randn(2, 7, 6).to(dtype)
    mask = torch.tensor([[True] * 7, [True, False] * 3 + [True]])
    recorded = layer(x, mask)
    with torch.no_grad(), Called() as called:
        assert torch.equal(layer(x, mask), recorded)
    assert ("silu" in called.names) == (kind is pkm.ProductKeyExperts)
    # What autocast makes of the gate need not be of the table's dtype.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = layer.float()(x.float())
    torch.testing.assert_close(found, layer(x.float()).to(found.dtype), atol=0.1, rtol=0.1)


def saved_bytes(layer, x, run):
    """What autograd keeps for a backward pass, each storage once, without x and parameters."""
    known = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return sum(saved.values())


@pytest.mark.parametrize(("output", "rows"), [("gated", 4), ("linear", 1)])
def test_saved_for_backward(output, rows):
    """No more than without the option and a few rows a token; checkpointed nothing but x."""
    x = torch.randn(50, 6, requires_grad=True)
    plain, layer = (pkm.ProductKeyMemory(6, 3, **SIZES, output=each) for each in (None, output))
    assert saved_bytes(layer, x, layer) <= saved_bytes(plain, x, plain) + rows * 50 * 3 * 4
    assert saved_bytes(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False)) == 0


@pytest.mark.parametrize("kind", ["rms", "l2"])
@pytest.mark.parametrize("layer_kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_normalised_queries_and_keys(layer_kind, kind):
    options = {**SIZES, "query_norm": kind, "key_norm": kind}
    layer = layer_kind(6, **options, dtype=DOUBLE)
    x = 100 * torch.randn(7, 6, dtype=DOUBLE)
    query = array(layer.query_net.layers(x)).reshape(7, 2, 4)
    query = 2 * query / np.sqrt((query**2).sum(-1, keepdims=True))
    torch.testing.assert_close(layer.query_net(x), torch.from_numpy(query))
    keys = array(getattr(layer, layer.keys_name))
    keys = keys / np.sqrt((keys**2).sum(-1, keepdims=True))
    if layer_kind is pkm.ProductKeyMemory:
        first, second = np.split(query, 2, axis=-1)
        rows = np.einsum("thd,hnd->thn", first, keys[:, 0])
        columns = np.einsum("thd,hnd->thn", second, keys[:, 1])
        scores = (rows[..., :, None] + columns[..., None, :]).reshape(7, 2, 25)
    else:
        scores = np.einsum("thd,hkd->thk", query, keys)
    best = torch.from_numpy(scores).topk(3).values
    torch.testing.assert_close(layer.lookup(x)[0], best.softmax(-1))
    # The scale is learned.
    layer(x).sum().backward()
    assert layer.key_norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_derivatives(norm):
    options = {**SIZES, "query_norm": norm, "key_norm": norm, "output": "gated"}
    layer = pkm.ProductKeyMemory(4, **options, dtype=DOUBLE)
    parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)

    def run(x, *tensors):
        return functional_call(layer, dict(zip(parameters, tensors, strict=True)), (x,))

    assert gradcheck(run, (x, *parameters.values()))
    assert gradgradcheck(lambda x: run(x, *parameters.values()), (x,), atol=1e-4)
    tangent, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        expected = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    found = jvp(layer, (x.detach(),), (tangent,))[1]
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)


def test_initialisation_and_what_is_new():
    layer = pkm.ProductKeyMemory(256, 64, **SIZES, output="gated", key_norm="l2")
    for map in (layer.output.value_proj, layer.output.gate_proj):
        assert map.bias is not None
        assert 0.9 / 16 < map.weight.std() < 1.1 / 16
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    changed = [n for n, p in layer.state_dict().items() if not torch.equal(p, before[n])]
    assert {"output.value_proj.weight", "output.gate_proj.bias", "values"} <= set(changed)
    plain = pkm.ProductKeyMemory(8, **SIZES)
    assert {"key_norm", "output"}.isdisjoint(plain.arguments())
    assert not any("output" in name or "norm" in name for name in plain.state_dict())


def test_padding():
    layer = pkm.ProductKeyMemory(4, **{**SIZES, "query_norm": "batch"}, output="gated")
    x, mask = torch.randn(6, 4), torch.tensor([True, True, False, True, False, True])
    dirty = x.clone()
    dirty[~mask] = torch.nan
    out = layer(dirty.requires_grad_(), mask)
    assert not out[~mask].any()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_saved_and_loaded(tmp_path):
    options = {**SIZES, "query_norm": "rms", "key_norm": "l2", "output": "gated"}
    model = nn.Sequential(pkm.ProductKeyMemory(4, **options), pkm.ProductKeyMemory(4, **options))
    pkm.share_values(model)
    pkm.save_with_memory(model, tmp_path / "model.pt")
    empty = nn.Sequential(nn.Identity(), nn.Identity())
    loaded = pkm.load_with_memory(empty, tmp_path / "model.pt")
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].arguments() == model[0].arguments()
    assert loaded[0].values is loaded[1].values


@pytest.mark.parametrize("sparse_grad", [False, True, "factored"])
def test_a_shared_pool_has_one_gradient_and_one_state(sparse_grad):
    layers = [pkm.ProductKeyMemory(4, **SIZES, sparse_grad=sparse_grad) for _ in range(3)]
    model = nn.Sequential(*layers)
    (pool,) = pkm.share_values(layers)
    assert all(layer.values is pool for layer in layers)
    assert sum(p is pool for p in model.parameters()) == 1
    x = torch.randn(6, 4)
    sum(layer(x).sum() for layer in layers).backward()
    separate = []
    for layer in layers:
        alone = copy.deepcopy(layer)
        alone.zero_grad()
        alone(x).sum().backward()
        separate.append(alone.values.grad.to_dense())
    torch.testing.assert_close(pool.grad.to_dense(), sum(separate))
    optimiser = pkm.optim.SparseAdam(pkm.param_groups(model))
    optimiser.step()
    assert sum(p is pool for p in optimiser.state) == 1


def test_a_shared_pool_under_checkpointing():
    layers = [pkm.ProductKeyMemory(4, **SIZES, output="gated") for _ in range(2)]
    pkm.share_values(layers)
    x = torch.randn(6, 4, requires_grad=True)
    layers[1](layers[0](x)).square().sum().backward()
    expected, layers[0].values.grad = layers[0].values.grad, None
    hidden = checkpoint(layers[0], x, use_reentrant=False)
    checkpoint(layers[1], hidden, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(layers[0].values.grad, expected)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), TypeError, r"layers\[1\] is Linear"),
        (lambda: pkm.FlatKeyMemory(4, **SIZES), TypeError, r"layers\[1\] is FlatKeyMemory"),
        (lambda: pkm.ProductKeyMemory(4, 5, **SIZES), ValueError, r"values has shape .*5\]"),
        (
            lambda: pkm.ProductKeyMemory(4, **SIZES, dtype=DOUBLE),
            ValueError,
            r"values has dtype torch\.float64",
        ),
        (
            lambda: pkm.ProductKeyMemory(4, **SIZES, sparse_grad=True),
            ValueError,
            r"layers\[1\] has sparse_grad=True, but the first has False",
        ),
    ],
)
def test_pools_that_do_not_fit(other, error, message):
    layers = [pkm.ProductKeyMemory(4, **SIZES), other()]
    with pytest.raises(error, match=message):
        pkm.share_values(layers)
    with pytest.raises(ValueError, match="layers is empty"):
        pkm.share_values([])


def test_preset():
    with torch.device("meta"):
        layer = pkm.presets.memory_plus(64)
    assert (layer.num_subkeys, layer.heads, layer.top_k, layer.query_dim) == (1024, 4, 32, 512)
    assert layer.output.kind == "gated"
    small = pkm.presets.memory_plus(8, num_subkeys=16, top_k=4)
    assert small(torch.randn(3, 8)).shape == (3, 8)
    assert pkm.presets.memory_plus_layers(24) == (4, 12, 20)
    assert pkm.presets.memory_plus_layers(12) == (2, 6, 10)
    assert pkm.presets.memory_plus_layers(5) == (1, 3, 5)
    assert pkm.presets.memory_plus_layers(9, n=1) == (5,)
    with pytest.raises(ValueError, match="do not fit into 8 layers: at most 3 apart"):
        pkm.presets.memory_plus_layers(8, stride=4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"output": "swiglu"}, "output is 'swiglu', but must be one of 'gated', 'linear', None"),
        ({"key_norm": "layer"}, "key_norm is 'layer', but must be one of 'rms', 'l2', None"),
    ],
)
def test_unknown_options(option, message):
    with pytest.raises(ValueError, match=message):
        pkm.ProductKeyMemory(4, **SIZES, **option)
