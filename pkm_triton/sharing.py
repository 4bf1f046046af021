"""One pool of values for several memories (Berges et al. 2024)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from ._module import Pool
from .memory import _KeyValueMemory


def share_values(layers: Iterable[nn.Module]) -> tuple[nn.Parameter, ...]:
    """Let several memories read one pool of values: that of the first.

    The pool is one parameter of the model: it is stored, saved, stepped and averaged once, and its
    gradients from all layers add up. Each layer keeps keys of its own. Call it before the optimiser
    is made.

    Args:
        layers: memories of one kind, with as many slots and as wide values.

    Returns:
        The tables that are shared: the values, and of `ProductKeyExperts` the inputs too.

    Raises:
        TypeError: if one is no memory, or of another kind than the first.
        ValueError: if there is none, or a table differs in shape, dtype, device, the form of its
            gradient, or its sharding; nothing has been shared then.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be memories, not {type(layers).__name__}")
    memories: list[Any] = list(layers)
    if not memories:
        raise ValueError("layers is empty: there is nothing to share")
    first = memories[0]
    for index, layer in enumerate(memories):
        if not isinstance(layer, _KeyValueMemory) or type(layer) is not type(first):
            raise TypeError(
                f"layers[{index}] is {type(layer).__name__}, but all must be memories of one kind, "
                f"as the first, {type(first).__name__}"
            )
        for name in layer.table_names:
            ours, theirs = getattr(first, name), getattr(layer, name)
            for what in ("shape", "dtype", "device"):
                if getattr(ours, what) != getattr(theirs, what):
                    raise ValueError(
                        f"layers[{index}].{name} has {what} {getattr(theirs, what)}, but the "
                        f"first's has {getattr(ours, what)}"
                    )
        if layer.sharding is not first.sharding:
            raise ValueError(
                f"layers[{index}] is not sharded as the first: share values before shard_memory"
            )
        if layer.sparse_grad != first.sparse_grad:
            raise ValueError(
                f"layers[{index}] has sparse_grad={layer.sparse_grad!r}, but the first has "
                f"{first.sparse_grad!r}: gradients of one table must be of one form"
            )
    assert isinstance(first, _KeyValueMemory)
    for layer in memories:
        for name in first.table_names:
            setattr(layer, name, getattr(first, name))
    pool_equals(memories)
    return first.tables


def pool_equals(layers: Iterable[_KeyValueMemory]) -> None:
    """Let memories that have the same tables know each other, with those that had them before."""
    every = dict.fromkeys(each for layer in layers for each in (layer, *layer.pool))
    pools: dict[tuple[int, ...], Pool] = defaultdict(Pool)
    for layer in every:
        # What a parametrization makes is made anew each time.
        tables = (layer._parameters.get(name, layer) for name in layer.table_names)
        pools[tuple(map(id, tables))].append(layer)
    for pool in pools.values():
        for layer in pool:
            layer.pool = pool if len(pool) > 1 else ()
