"""What a file of `save_with_memory` holds."""

from collections.abc import Mapping
from typing import Any

from ._kinds import KINDS
from ._state import EXTRA_STATE, is_plain
from .memory import _KeyValueMemory


class SavedModel:
    """What a file holds, its form checked.

    Attributes:
        state: the state dict.
        memories: of each memory its names, its kind, and the arguments that make it.
        shared: the names of each parameter that has several.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.state: dict[str, Any] = content["state"]
        for key, part in self.state.items():
            if not isinstance(key, str) or not (is_plain(part) or key.endswith(EXTRA_STATE)):
                raise ValueError(f"the state {key!r} is no plain tensor")
        memories = content["memories"]
        if content["version"] == 1:
            memories = [{"names": [name], **memory} for name, memory in memories.items()]
        self.memories: list[tuple[list[str], type[_KeyValueMemory], dict[str, Any]]] = []
        for memory in memories:
            kind = KINDS.get(memory["kind"])
            if kind is None:
                raise ValueError(f"there is no memory of the kind {memory['kind']!r}")
            self.memories.append((_names(memory["names"]), kind, dict(memory["arguments"])))
        self.shared = [_names(names) for names in content["shared"]]
        for names in self.shared:
            shapes = {(self.state[n].shape, self.state[n].dtype) for n in names}
            if len(shapes) > 1:
                raise ValueError(f"shared parameters differ in shape or dtype: {names}")


def _names(names: Any) -> list[str]:
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{names!r} is no list of names")
    return names
