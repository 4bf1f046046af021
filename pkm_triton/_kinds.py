"""The kinds of memory layers that can be described as plain data, and built again."""

from typing import Any

from .experts import ProductKeyExperts
from .memory import FlatKeyMemory, ProductKeyMemory, _KeyValueMemory

KINDS: dict[str, type[_KeyValueMemory]] = {
    kind.__name__: kind for kind in (ProductKeyMemory, FlatKeyMemory, ProductKeyExperts)
}


def described(name: str, layer: _KeyValueMemory) -> dict[str, Any]:
    """The kind and the arguments of the memory `name`, as plain data.

    Raises:
        TypeError: if those would not make it again: it is of a derived class, or has parts that
            were put in later.
    """
    kind = type(layer).__name__
    if KINDS.get(kind) is not type(layer):
        raise TypeError(
            f"the memory {name!r} is a {kind}, but only {', '.join(KINDS)} can be saved with what "
            "they are"
        )
    fresh = KINDS[kind](**layer.arguments(), device="meta").state_dict()
    ours = layer.state_dict()
    for key in sorted({*fresh, *ours}):
        if key not in fresh or key not in ours or fresh[key].shape != ours[key].shape:
            raise TypeError(
                f"the memory {name!r} cannot be saved with what it is: {key!r} is not what a "
                f"{kind} has; merge slots that train, take out adapters and quantised maps first"
            )
    return {"kind": kind, "arguments": layer.arguments()}
