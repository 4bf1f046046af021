"""The original memory: XLM's `HashingMemory`, product and flat."""

from collections.abc import Mapping

from torch import Tensor

from pkm_triton.memory import FlatKeyMemory, ProductKeyMemory

from .layout import (
    Layout,
    build,
    check_expressible,
    check_heads,
    check_shape,
    copies,
    linear_layers,
    zeros_like_rows,
)

_MLP = "query_proj.query_mlps."
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def from_xlm(
    state: Mapping[str, Tensor], top_k: int, prefix: str = ""
) -> ProductKeyMemory | FlatKeyMemory:
    """The layer of an XLM memory's state dict.

    Args:
        state: with `query_proj.query_mlps.0.*` (and `.1.*`, the batch norm; or `.0.0.*`, `.0.2.*`
            and so on of a network with hidden layers), `keys` [H, 2, N, d_q / 2], [N, d_q / 2]
            shared by all, or [H, K, d_q] of flat keys, and `values.weight`.
        top_k: k, which no tensor tells (`mem_knn`).
        prefix: of the memory's names, such as "memories.4_after.".

    Returns:
        A layer that holds copies.

    Raises:
        TypeError: if the state is no mapping of tensors, or top_k no integer.
        ValueError: if tensors are missing (all are named), left over, or do not fit together.
    """
    layout = Layout("XLM", state, prefix)
    deep = linear_layers(layout.left, f"{_MLP}0.") if not layout.has(f"{_MLP}0.weight") else []
    stems = deep or [f"{_MLP}0"]
    norm = "batch" if not deep and layout.has(f"{_MLP}1.") else None
    names = {f"{stem}.weight": f"query_net.layers.{2 * i}.weight" for i, stem in enumerate(stems)}
    if norm is not None:
        names |= {f"{_MLP}1.{name}": f"query_net.norm.{name}" for name in _NORM}
    *parts, keys, values = layout.take(*names, "keys", "values.weight")
    tensors = dict(zip(names.values(), parts, strict=True))
    for index, stem in enumerate(stems):
        weight, bias = tensors[f"query_net.layers.{2 * index}.weight"], f"{stem}.bias"
        check_shape(f"{stem}.weight", weight, None, None)
        tensors[f"query_net.layers.{2 * index}.bias"] = (
            layout.take(bias)[0] if layout.has(bias) else zeros_like_rows(weight)
        )
    layout.finish()
    if keys.ndim not in (2, 3, 4):
        raise ValueError(f"keys has {keys.ndim} dimensions, but must have 2, 3 or 4")
    weights = [tensors[f"query_net.layers.{2 * index}.weight"] for index in range(len(stems))]
    rows = weights[-1].shape[0]
    flat = keys.ndim == 3
    query_dim = keys.shape[-1] if flat else 2 * keys.shape[-1]
    heads = check_heads(rows, query_dim, "the query network")
    if keys.ndim == 2:
        keys = keys.expand(heads, 2, *keys.shape)
    num_subkeys = round(keys.shape[1] ** 0.5) if flat else keys.shape[-2]
    check_shape("keys", keys, *((heads, num_subkeys**2) if flat else (heads, 2)), *keys.shape[2:])
    check_shape("values.weight", values, num_subkeys**2, None)
    kind = FlatKeyMemory if flat else ProductKeyMemory
    return build(
        kind,
        {**tensors, kind.keys_name: keys, "values": values},
        dim=weights[0].shape[1],
        value_dim=values.shape[1],
        num_subkeys=num_subkeys,
        heads=heads,
        top_k=top_k,
        query_dim=query_dim,
        query_norm=norm,
        query_hidden=[weight.shape[0] for weight in weights[:-1]],
    )


def to_xlm(layer: ProductKeyMemory | FlatKeyMemory, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of an XLM memory that computes what the layer does.

    Args:
        layer: with query_norm "batch" or None, and without what XLM has not.
        prefix: put before every name.

    Raises:
        TypeError: if it is no such layer, or has parts that were put in later, such as adapters.
        ValueError: if it has an option that XLM's layout cannot express.
    """
    kind = FlatKeyMemory if isinstance(layer, FlatKeyMemory) else ProductKeyMemory
    check_expressible(layer, kind, query_norm=("batch", None), key_norm=(None,), output=(None,))
    state, deep = layer.state_dict(), bool(layer.query_net.hidden)
    if deep:
        check_expressible(layer, kind, query_norm=(None,))
    out: dict[str, Tensor] = {"keys": state[kind.keys_name], "values.weight": state["values"]}
    for name, tensor in state.items():
        if name.startswith("query_net.layers."):
            place = name.removeprefix("query_net.layers.")
            out[_MLP + (f"0.{place}" if deep else place)] = tensor
        if name.startswith("query_net.norm."):
            out[f"{_MLP}1.{name.removeprefix('query_net.norm.')}"] = tensor
    return copies(out, prefix)
