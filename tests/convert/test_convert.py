"""State dicts of other memories, made by hand, and the formulas of those layouts written out."""

import pytest
import torch
import torch.nn.functional as F

import pkm_triton as pkm
from pkm_triton import convert

HEADS, N, HALF, DIM, WIDTH, TOP_K = 2, 5, 3, 6, 4, 4
QUERY = HEADS * 2 * HALF
XLM, META = "memories.4_after.", "layers.11.feed_forward."
MLP = "query_proj.query_mlps."


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def read(query, subkeys, values, gate=lambda scores: scores.softmax(-1)):
    """Of queries [T, H, 2 D], sub-keys [H, 2, N, D]: by scoring all slots."""
    first, second = query.chunk(2, -1)
    rows = torch.einsum("thd,hnd->thn", first, subkeys[:, 0])
    columns = torch.einsum("thd,hnd->thn", second, subkeys[:, 1])
    scores, slots = (rows[..., :, None] + columns[..., None, :]).flatten(-2).topk(TOP_K)
    weights = gate(scores)
    return weights, slots, torch.einsum("thk,thkd->td", weights, values[slots])


def xlm_state():
    return {
        f"{MLP}0.weight": random(QUERY, DIM),
        f"{MLP}0.bias": random(QUERY),
        f"{MLP}1.weight": random(QUERY),
        f"{MLP}1.bias": random(QUERY),
        f"{MLP}1.running_mean": random(QUERY),
        f"{MLP}1.running_var": random(QUERY).square(),
        f"{MLP}1.num_batches_tracked": torch.tensor(7),
        "keys": random(HEADS, 2, N, HALF),
        "values.weight": random(N**2, WIDTH),
    }


def xlm(s, x):
    q = x @ s[f"{MLP}0.weight"].T + s[f"{MLP}0.bias"]
    mean, var = s[f"{MLP}1.running_mean"], s[f"{MLP}1.running_var"]
    q = (q - mean) / (var + 1e-5).sqrt() * s[f"{MLP}1.weight"] + s[f"{MLP}1.bias"]
    return read(q.view(-1, HEADS, 2 * HALF), s["keys"], s["values.weight"])[2]


def xlm_deep_state():
    return {
        f"{MLP}0.0.weight": random(7, DIM),
        f"{MLP}0.0.bias": random(7),
        f"{MLP}0.2.weight": random(QUERY, 7),
        f"{MLP}0.2.bias": random(QUERY),
        "keys": random(N, HALF),
        "values.weight": random(N**2, WIDTH),
    }


def xlm_deep(s, x):
    hidden = F.relu(x @ s[f"{MLP}0.0.weight"].T + s[f"{MLP}0.0.bias"])
    q = hidden @ s[f"{MLP}0.2.weight"].T + s[f"{MLP}0.2.bias"]
    keys = s["keys"].expand(HEADS, 2, N, HALF)
    return read(q.view(-1, HEADS, 2 * HALF), keys, s["values.weight"])[2]


def xlm_flat_state():
    return {
        f"{MLP}0.weight": random(QUERY, DIM),
        "keys": random(HEADS, N**2, 2 * HALF),
        "values.weight": random(N**2, WIDTH),
    }


def xlm_flat(s, x):
    q = (x @ s[f"{MLP}0.weight"].T).view(-1, HEADS, 2 * HALF)
    scores, slots = torch.einsum("thd,hkd->thk", q, s["keys"]).topk(TOP_K)
    return torch.einsum("thk,thkd->td", scores.softmax(-1), s["values.weight"][slots])


def meta_state(gated=True):
    state = {
        f"{MLP}0.weight": random(QUERY, DIM),
        f"{MLP}0.bias": random(QUERY),
        "keys": random(2 * HEADS * N, HALF),
        "values.weight": random(N**2, WIDTH),
        "value_proj.weight": random(DIM, WIDTH),
        "value_proj.bias": random(DIM),
    }
    if gated:
        state |= {
            "swilu_projection.weight": random(WIDTH, DIM),
            "swilu_projection.bias": random(WIDTH),
        }
    return state


def meta(s, x):
    q = (x @ s[f"{MLP}0.weight"].T + s[f"{MLP}0.bias"]).view(-1, HEADS, 2 * HALF)
    out = read(q, s["keys"].view(HEADS, 2, N, HALF), s["values.weight"])[2]
    if "swilu_projection.weight" in s:
        out = out * F.silu(x @ s["swilu_projection.weight"].T + s["swilu_projection.bias"])
    return out @ s["value_proj.weight"].T + s["value_proj.bias"]


def peer_state():
    state = meta_state(gated=False)
    for name in ("values.weight", "value_proj.weight", "value_proj.bias"):
        del state[name]
    return state | {"values_u": random(N**2, DIM), "values_v": random(N**2, DIM)}


def peer(s, x):
    q = (x @ s[f"{MLP}0.weight"].T + s[f"{MLP}0.bias"]).view(-1, HEADS, 2 * HALF)
    weights, slots, _ = read(q, s["keys"].view(HEADS, 2, N, HALF), s["values_v"])
    hidden = F.gelu(torch.einsum("td,thkd->thk", x, s["values_u"][slots]))
    return torch.einsum("thk,thkd->td", weights * hidden, s["values_v"][slots])


def lucidrains_state():
    return {
        "to_queries.weight": random(QUERY, DIM),
        "keys": random(HEADS, N, 2, HALF),
        "values.weight": random(N**2, DIM),
    }


def lucidrains(s, x):
    q = (x @ s["to_queries.weight"].T).view(-1, 2, HEADS, HALF)  # half, head, d
    q = q.transpose(1, 2).flatten(2)
    return read(q, s["keys"].permute(0, 2, 1, 3), s["values.weight"])[2]


LAYOUTS = {
    "xlm": (xlm_state, xlm, XLM, convert.from_xlm, convert.to_xlm),
    "xlm, hidden layers and shared keys": (
        xlm_deep_state, xlm_deep, XLM, convert.from_xlm, convert.to_xlm,
    ),
    "xlm, flat keys": (xlm_flat_state, xlm_flat, XLM, convert.from_xlm, convert.to_xlm),
    "meta, gated": (meta_state, meta, META, convert.from_meta, convert.to_meta),
    "meta, linear": (
        lambda: meta_state(False), meta, META, convert.from_meta, convert.to_meta,
    ),
    "meta, peer": (peer_state, peer, META, convert.from_meta, convert.to_meta),
    "lucidrains": (
        lucidrains_state, lucidrains, "pkm.", convert.from_lucidrains, convert.to_lucidrains,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_outputs_and_gradients(name):
    make, formula, prefix, load, _ = LAYOUTS[name]
    state = make()
    kept = {prefix + key: tensor.clone() for key, tensor in state.items()}
    layer = load({**kept, "other.weight": torch.zeros(1)}, TOP_K, prefix).eval()
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in state.items()}
    x, mine = random(9, DIM).requires_grad_(), None
    theirs = formula(leaves, x)
    mine = layer(x)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    expected = torch.autograd.grad(theirs, [x, leaves["keys"]], upstream, retain_graph=True)
    keys = layer.get_parameter(layer.keys_name)
    found = torch.autograd.grad(mine, [x, keys, layer.values], upstream)
    torch.testing.assert_close(found[0], expected[0])
    if leaves["keys"].numel() == found[1].numel():
        shape = found[1].shape
        same = expected[1]
        if name == "lucidrains":
            same = same.permute(0, 2, 1, 3)
        torch.testing.assert_close(found[1], same.reshape(shape))
    else:  # shared by all heads and halves
        torch.testing.assert_close(found[1].sum((0, 1)), expected[1])
    values = leaves["values_v" if name == "meta, peer" else "values.weight"]
    (expected_values,) = torch.autograd.grad(theirs, values, upstream)
    torch.testing.assert_close(found[2], expected_values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name):
    make, _, prefix, load, store = LAYOUTS[name]
    state = {prefix + key: tensor for key, tensor in make().items()}
    again = store(load(state, TOP_K, prefix), prefix)
    for key, tensor in again.items():
        if key in state and state[key].shape == tensor.shape:
            assert torch.equal(tensor, state[key]), key
        assert tensor.data_ptr() not in {t.data_ptr() for t in state.values()}
    assert set(state) <= set(again)
    torch.testing.assert_close(store(load(again, TOP_K, prefix), prefix), again, rtol=0, atol=0)


def test_a_pool_of_its_own_dtype_that_a_later_layer_has_not():
    state, pool = meta_state(), random(N**2, WIDTH).bfloat16()
    del state["values.weight"]
    with pytest.raises(ValueError, match=r"it has no values\.weight"):
        convert.from_meta(state, TOP_K)
    layer = convert.from_meta(state, TOP_K, values=pool)
    assert layer.values.dtype == torch.bfloat16
    assert layer.values.requires_grad


def test_the_package_itself():
    package = pytest.importorskip("product_key_memory")
    theirs = package.PKM(
        8, heads=2, num_keys=16, topk=4, dim_head=6, query_layernorm=False, pre_layernorm=False,
        post_layernorm=False, input_dropout=0.0, query_dropout=0.0, value_dropout=0.0,
    )  # fmt: skip
    layer = convert.from_lucidrains(theirs.state_dict(), 4)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer(x), theirs(x))


@pytest.mark.parametrize(
    ("load", "state", "message"),
    [
        (
            convert.from_xlm,
            {"query_proj.query_mlps.1.bias": random(1)},
            r"no m\.query_proj\.query_mlps\.0\.weight, \S+1\.weight, \S+1\.running_mean, "
            r"\S+1\.running_var, \S+1\.num_batches_tracked, m\.keys, m\.values\.weight",
        ),
        (
            convert.from_xlm,
            {"query_proj.query_mlps.0.4.bias": random(1)},
            r"no \S+0\.0\.weight, \S+0\.2\.weight, \S+0\.4\.weight, m\.keys, m\.values\.weight",
        ),
        (convert.from_xlm, xlm_state() | {"keys": random(1)}, "keys has 1 dimensions, but must ha"),
        (
            convert.from_meta,
            {"swilu_projection.bias": random(1)},
            r"m\.keys, m\.values\.weight, m\.value_\S+weight, m\.value_\S+bias, m\.sw\S+weight$",
        ),
        (convert.from_meta, {"keys": random(1)}, r"0\.weight, m\.query_\S+bias, m\.values\.weight"),
        (convert.from_lucidrains, {"keys": random(1)}, r"to_queries\.weight, m\.values\.weight"),
        (
            convert.from_lucidrains,
            lucidrains_state() | {"norm.weight": random(HALF), "norm.bias": random(HALF)},
            r"what no layer here can express: m\.norm\.bias, m\.norm\.weight",
        ),
        (convert.from_meta, meta_state() | {"gating.weight": random(1, DIM)}, r"m\.gating\.weight"),
        (
            convert.from_meta,
            meta_state() | {"keys": random(2 * HEADS * N + 1, HALF)},
            "keys has 21 features, which is no multiple",
        ),
        (
            convert.from_xlm,
            xlm_state() | {"values.weight": random(24, WIDTH)},
            r"values\.weight has shape \[24, 4\], but must have \[25, \*\]",
        ),
        (
            convert.from_xlm,
            xlm_flat_state() | {"keys": random(HEADS, 24, 2 * HALF)},
            r"keys has shape \[2, 24, 6\], but must have \[2, 25, 6\]",
        ),
    ],
)
def test_other_layouts_are_refused(load, state, message):
    with pytest.raises(ValueError, match=message):
        load({f"m.{name}": tensor for name, tensor in state.items()}, TOP_K, "m.")


def test_wrong_calls():
    with pytest.raises(TypeError, match="state must be a state dict, not list"):
        convert.from_xlm([], TOP_K)
    with pytest.raises(ValueError, match=r"no key that begins with 'x\.', but such as "):
        convert.from_xlm(xlm_state(), TOP_K, "x.")
    with pytest.raises(ValueError, match="no key that begins with '', nor any other"):
        convert.from_xlm({}, TOP_K)
    with pytest.raises(
        TypeError, match=r"state\['keys'\] has dtype torch.int64, but must have one"
    ):
        convert.from_xlm(xlm_state() | {"keys": torch.ones(2, 2, 5, 3, dtype=torch.int64)}, TOP_K)
    with pytest.raises(TypeError, match="values must be a tensor, not int"):
        convert.from_meta(meta_state(), TOP_K, values=3)
    with pytest.raises(ValueError, match="top_k is 26"):
        convert.from_xlm(xlm_state(), 26)
    sizes = {"num_subkeys": 4, "heads": 2, "top_k": 3, "query_dim": 4}
    layer = pkm.ProductKeyMemory(4, **sizes, query_norm="layer")
    for store in (convert.to_xlm, convert.to_meta, convert.to_lucidrains):
        with pytest.raises(ValueError, match="query_norm='layer', which that layout cannot"):
            store(layer)
    for option in ({"activation": "relu"}, {"gate": "relu"}):
        experts = pkm.ProductKeyExperts(4, **sizes, query_norm=None, **option)
        with pytest.raises(ValueError, match="='relu', which that layout cannot express"):
            convert.to_meta(experts)
    layer = pkm.ProductKeyMemory(4, **sizes, query_norm=None)
    with pytest.raises(ValueError, match="queries have a bias"):
        convert.to_lucidrains(layer)
    pkm.train_slots(layer, torch.tensor([1]))
    for store in (convert.to_xlm, convert.to_meta, convert.to_lucidrains):
        with pytest.raises(TypeError, match=r"'tuned\.slots' is not what a .*; merge slots"):
            store(layer)
    with pytest.raises(TypeError, match="layer must be a ProductKeyMemory, not Linear"):
        convert.to_xlm(torch.nn.Linear(2, 2))
