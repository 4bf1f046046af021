"""What the converters share: a state dict that is taken apart, and layers built without data."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pkm_triton._checks import FLOATING_DTYPES
from pkm_triton._kinds import described
from pkm_triton.memory import _KeyValueMemory

Memory = TypeVar("Memory", bound=_KeyValueMemory)


class Layout:
    """The tensors of a state dict under a prefix, taken one by one.

    Args:
        source: what the layout is of, for messages.
        state: the state dict.
        prefix: what the names of the memory's tensors begin with.

    Raises:
        TypeError: if the state is no mapping, or a value under the prefix no floating tensor.
        ValueError: if nothing has the prefix.
    """

    def __init__(self, source: str, state: Mapping[str, Tensor], prefix: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a state dict, not {type(state).__name__}")
        self.source = source
        self.prefix = prefix
        named = {str(name): tensor for name, tensor in state.items()}
        self.left = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
        if not self.left:
            some = f"but such as {', '.join(sorted(named)[:5])}" if named else "nor any other"
            raise ValueError(f"state has no key that begins with {prefix!r}, {some}")
        for name, tensor in self.left.items():
            if name.endswith("num_batches_tracked") and isinstance(tensor, Tensor):
                continue
            check_floating(f"state[{prefix + name!r}]", tensor)

    def has(self, stem: str) -> bool:
        """Whether there is a tensor whose name begins so, and that has not been taken."""
        return any(name.startswith(stem) for name in self.left)

    def take(self, *names: str) -> list[Tensor]:
        """The tensors of those names.

        Raises:
            ValueError: if some are missing; all of them are named.
        """
        missing = [self.prefix + name for name in names if name not in self.left]
        if missing:
            raise ValueError(
                f"state is not of {self.source}'s layout: it has no {', '.join(missing)}"
            )
        return [self.left.pop(name) for name in names]

    def finish(self) -> None:
        """Nothing is left over.

        Raises:
            ValueError: if there is; all of it is named.
        """
        if self.left:
            names = ", ".join(sorted(self.prefix + name for name in self.left))
            raise ValueError(f"state has what no layer here can express: {names}")


def check_floating(name: str, tensor: Any) -> None:
    """The tensor is one of numbers that a layer may hold.

    Raises:
        TypeError: if not.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in FLOATING_DTYPES:
        allowed = ", ".join(str(each) for each in FLOATING_DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}, but must have one of {allowed}")


def check_shape(name: str, tensor: Tensor, *sizes: int | None) -> None:
    """The tensor has that shape; None stands for any size.

    Raises:
        ValueError: if not.
    """
    fits = tensor.ndim == len(sizes) and all(
        size in (None, have) for size, have in zip(sizes, tensor.shape, strict=True)
    )
    if not fits:
        form = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have [{form}]")


def check_heads(rows: int, query_dim: int, name: str) -> int:
    """The heads of a query network of so many output features.

    Raises:
        ValueError: if they are not as many for each head.
    """
    if query_dim < 1 or rows % query_dim:
        raise ValueError(
            f"{name} has {rows} features, which is no multiple of a query's {query_dim}"
        )
    return rows // query_dim


def build(kind: type[Memory], state: Mapping[str, Tensor], **arguments: Any) -> Memory:
    """A layer that holds copies of these tensors, in their own dtypes.

    Raises:
        ValueError: if a shape does not fit.
    """
    layer = kind(**arguments, device="meta")
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    for name, tensor in layer.state_dict().items():
        if name in copies:
            check_shape(name, copies[name], *tensor.shape)
    layer.load_state_dict(copies, assign=True)
    return layer


def check_expressible(layer: nn.Module, kind: type[nn.Module], **needed: Any) -> None:
    """`layer` is of a kind, and its options are among those that the other layout has.

    Raises:
        TypeError: if it is of another kind, or has parts that were put in later.
        ValueError: if an option has no place there.
    """
    if type(layer) is not kind:
        raise TypeError(f"layer must be a {kind.__name__}, not {type(layer).__name__}")
    description = described("layer", layer)  # pyright: ignore[reportArgumentType]
    arguments: dict[str, Any] = {"key_norm": None, "output": None, **description["arguments"]}
    for name, allowed in needed.items():
        if arguments[name] not in allowed:
            raise ValueError(
                f"the layer has {name}={arguments[name]!r}, which that layout cannot express: "
                f"only {', '.join(map(repr, allowed))}"
            )


def copies(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of tensors, their names with a prefix."""
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def linear_layers(state: Iterable[str], stem: str) -> list[str]:
    """The names of the linear maps of a sequence in which every other one is an activation."""
    places = [name.removeprefix(stem).split(".")[0] for name in state if name.startswith(stem)]
    last = max((int(place) for place in places if place.isdecimal()), default=-1)
    return [f"{stem}{number}" for number in range(0, last + 1, 2)]


def zeros_like_rows(weight: Tensor) -> Tensor:
    """A bias of nothing for a linear map's weight."""
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
