"""The memories of facebookresearch/memory ("Memory Layers at Scale"), and its PEER."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pkm_triton.experts import ProductKeyExperts
from pkm_triton.memory import ProductKeyMemory

from .layout import (
    Layout,
    build,
    check_expressible,
    check_floating,
    check_heads,
    check_shape,
    copies,
)

_QUERY = ("query_proj.query_mlps.0.weight", "query_proj.query_mlps.0.bias")
_OUTPUT = {
    "value_proj.weight": "output.value_proj.weight",
    "value_proj.bias": "output.value_proj.bias",
    "swilu_projection.weight": "output.gate_proj.weight",
    "swilu_projection.bias": "output.gate_proj.bias",
}


def from_meta(
    state: Mapping[str, Tensor], top_k: int, prefix: str = "", values: Tensor | None = None
) -> ProductKeyMemory:
    """The layer of a memory of facebookresearch/memory.

    Args:
        state: with `query_proj.query_mlps.0.weight` and `.bias`, `keys` [2 · H · N, d_q / 2], and
            `values.weight`, or of PEER `values_u` and `values_v`; and where the output is gated or
            mapped `value_proj.*` and `swilu_projection.*`.
        top_k: k, which no tensor tells (`mem_knn`).
        prefix: of the memory's names, such as "layers.11.feed_forward.".
        values: the pool [N², v], for layers whose state dict has it not: there it is one tensor of
            all layers, stored with the first (see `share_values`).

    Returns:
        A `ProductKeyMemory`, or of PEER a `ProductKeyExperts`, that holds copies.

    Raises:
        TypeError: if the state is no mapping of tensors, or top_k no integer.
        ValueError: if tensors are missing (all are named), left over, or do not fit together.
    """
    layout = Layout("facebookresearch/memory", state, prefix)
    if values is not None:
        check_floating("values", values)
    peer = layout.has("values_u") or layout.has("values_v")
    names = [*_QUERY, "keys"]
    if peer:
        names += ["values_u", "values_v"]
    elif values is None:
        names.append("values.weight")
    elif layout.has("values.weight"):
        layout.take("values.weight")
    gated, mapped = layout.has("swilu_projection."), layout.has("value_proj.")
    outputs = list(_OUTPUT)[: 4 if gated else 2 if mapped else 0]
    found = dict(zip([*names, *outputs], layout.take(*names, *outputs), strict=True))
    layout.finish()
    weight, bias, keys = (found[name] for name in (*_QUERY, "keys"))
    table = found.get("values_v", found.get("values.weight", values))
    assert table is not None
    check_shape("keys", keys, None, None)
    check_shape(_QUERY[0], weight, None, None)
    half = keys.shape[1]
    heads = check_heads(weight.shape[0], 2 * half, _QUERY[0])
    num_subkeys = check_heads(keys.shape[0], 2 * heads, "keys")
    tensors = {
        "query_net.layers.0.weight": weight,
        "query_net.layers.0.bias": bias,
        "subkeys": keys.reshape(heads, 2, num_subkeys, half),
        "values": table,
    }
    check_shape("the values", table, num_subkeys**2, None)
    tensors |= {_OUTPUT[name]: found[name] for name in outputs}
    sizes = {
        "dim": weight.shape[1],
        "value_dim": table.shape[1],
        "num_subkeys": num_subkeys,
        "heads": heads,
        "top_k": top_k,
        "query_dim": 2 * half,
        "query_norm": None,
        "output": "gated" if gated else "linear" if mapped else None,
    }
    if peer:
        return build(ProductKeyExperts, {**tensors, "inputs": found["values_u"]}, **sizes)
    return build(ProductKeyMemory, tensors, **sizes)


def to_meta(layer: ProductKeyMemory, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a memory of facebookresearch/memory that computes what the layer does.

    Args:
        layer: a `ProductKeyMemory` or `ProductKeyExperts` without norms and hidden layers; experts
            with activation "gelu" and gate "softmax".
        prefix: put before every name.

    Raises:
        TypeError: if it is no such layer, or has parts that were put in later, such as adapters.
        ValueError: if it has an option that this layout cannot express.
    """
    kind = ProductKeyExperts if isinstance(layer, ProductKeyExperts) else ProductKeyMemory
    needed: dict[str, Any] = {"query_norm": (None,), "key_norm": (None,), "query_hidden": ([],)}
    if kind is ProductKeyExperts:
        needed |= {"activation": ("gelu",), "gate": ("softmax",)}
    check_expressible(layer, kind, **needed)
    state = layer.state_dict()
    out = {
        _QUERY[0]: state["query_net.layers.0.weight"],
        _QUERY[1]: state["query_net.layers.0.bias"],
        "keys": state["subkeys"].flatten(0, 2),
    }
    if kind is ProductKeyExperts:
        out |= {"values_u": state["inputs"], "values_v": state["values"]}
    else:
        out["values.weight"] = state["values"]
    out |= {theirs: state[ours] for theirs, ours in _OUTPUT.items() if ours in state}
    return copies(out, prefix)
