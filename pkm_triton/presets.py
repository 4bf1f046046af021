"""Memories as papers have them."""

from typing import Any

from ._checks import check_integer
from .memory import ProductKeyMemory


def memory_plus(dim: int, **options: Any) -> ProductKeyMemory:
    """A memory as Memory+ has it (Berges et al. 2024, "Memory Layers at Scale").

    1024² slots, 4 heads, 32 reads a head, queries of 512 without batch norm, values of the token's
    width, and a gated output. There several layers read one pool: see `share_values`, and
    `memory_plus_layers` for which layers of a model.

    Args:
        dim: width of a token.
        **options: of `ProductKeyMemory`, in place of those.

    Raises:
        TypeError: as `ProductKeyMemory`.
        ValueError: as `ProductKeyMemory`.
    """
    preset: dict[str, Any] = {
        "num_subkeys": 1024,
        "heads": 4,
        "top_k": 32,
        "query_dim": 512,
        "query_norm": None,
        "output": "gated",
    }
    return ProductKeyMemory(dim, **{**preset, **options})


def memory_plus_layers(num_layers: int, n: int = 3, stride: int | None = None) -> tuple[int, ...]:
    """Which of a model's layers, counted from 1, have memories in Memory+: n around the middle.

    Args:
        num_layers: layers of the model.
        n: memories, at least 1.
        stride: layers from one to the next; by default 8 in models of 24 layers or more, else 4, or
            as much as fits.

    Raises:
        TypeError: if an argument is no integer.
        ValueError: if so many do not fit.
    """
    num_layers, n = check_integer("num_layers", num_layers, 1), check_integer("n", n, 1)
    if n > num_layers:
        raise ValueError(f"n is {n}, but the model has only {num_layers} layers")
    if stride is None:
        widest = (num_layers - 1) // (n - 1) if n > 1 else 1
        stride = min(8 if num_layers >= 24 else 4, widest)
    stride = check_integer("stride", stride, 1)
    reach = (n - 1) * stride
    if reach >= num_layers:
        raise ValueError(
            f"{n} memories {stride} layers apart do not fit into {num_layers} layers: at most "
            f"{(num_layers - 1) // max(1, n - 1)} apart"
        )
    first = (num_layers - reach + 1) // 2
    return tuple(first + index * stride for index in range(n))
