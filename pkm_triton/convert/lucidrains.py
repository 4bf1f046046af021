"""The memory of the package `product-key-memory`."""

from collections.abc import Mapping

from torch import Tensor

from pkm_triton.memory import ProductKeyMemory

from .layout import (
    Layout,
    build,
    check_expressible,
    check_heads,
    check_shape,
    copies,
    zeros_like_rows,
)


def from_lucidrains(state: Mapping[str, Tensor], top_k: int, prefix: str = "") -> ProductKeyMemory:
    """The layer of a memory of `product-key-memory` that is built with `query_layernorm=False`.

    Args:
        state: with `to_queries.weight` [2 · H · d, dim], `keys` [H, N, 2, d] and `values.weight`.
        top_k: k, which no tensor tells (`topk`).
        prefix: of the memory's names.

    Returns:
        A layer that holds copies. Its query network has a bias, of zeros and frozen, where the
        package's has none.

    Raises:
        TypeError: if the state is no mapping of tensors, or top_k no integer.
        ValueError: if tensors are missing (all are named), left over (the norms of halves of a
            query and of the output have no place here), or do not fit together.
    """
    layout = Layout("product-key-memory", state, prefix)
    weight, keys, values = layout.take("to_queries.weight", "keys", "values.weight")
    layout.finish()
    check_shape("keys", keys, None, None, 2, None)
    check_shape("to_queries.weight", weight, None, None)
    heads, num_subkeys, _, width = keys.shape
    if check_heads(weight.shape[0], 2 * width, "to_queries.weight") != heads:
        raise ValueError(
            f"to_queries.weight has {weight.shape[0]} features, but keys are of {heads} heads of "
            f"{2 * width}"
        )
    check_shape("values.weight", values, num_subkeys**2, None)
    dim = weight.shape[1]
    halves = weight.reshape(2, heads, width, dim).permute(1, 0, 2, 3).reshape(-1, dim)
    layer = build(
        ProductKeyMemory,
        {
            "query_net.layers.0.weight": halves,
            "query_net.layers.0.bias": zeros_like_rows(weight),
            "subkeys": keys.permute(0, 2, 1, 3),
            "values": values,
        },
        dim=dim,
        value_dim=values.shape[1],
        num_subkeys=num_subkeys,
        heads=heads,
        top_k=top_k,
        query_dim=2 * width,
        query_norm=None,
    )
    layer.get_parameter("query_net.layers.0.bias").requires_grad_(False)
    return layer


def to_lucidrains(layer: ProductKeyMemory, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a memory of `product-key-memory` that computes what the layer does.

    Args:
        layer: without norms, hidden layers and output, and with a query bias of zeros.
        prefix: put before every name.

    Raises:
        TypeError: if it is no `ProductKeyMemory`, or has parts that were put in later, such as
            adapters.
        ValueError: if it has what this layout cannot express.
    """
    check_expressible(
        layer,
        ProductKeyMemory,
        query_norm=(None,),
        key_norm=(None,),
        output=(None,),
        query_hidden=([],),
    )
    state = layer.state_dict()
    if bool(state["query_net.layers.0.bias"].any()):
        raise ValueError("the layer's queries have a bias, which that layout cannot express")
    weight, width = state["query_net.layers.0.weight"], layer.query_dim // 2
    halves = weight.view(layer.heads, 2, width, layer.dim).permute(1, 0, 2, 3)
    out = {
        "to_queries.weight": halves.reshape(-1, layer.dim),
        "keys": state["subkeys"].permute(0, 2, 1, 3),
        "values.weight": state["values"],
    }
    return copies(out, prefix)
