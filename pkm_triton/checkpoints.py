"""Save a model with its memories in one file, and bring it back bitwise."""

import os
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .memory import FlatKeyMemory, ProductKeyMemory, _KeyValueMemory
from .replace import absorbed_modules, put_memory

_FORMAT = "pkm_triton model with memory"
_VERSION = 1
_KINDS = {kind.__name__: kind for kind in (ProductKeyMemory, FlatKeyMemory)}


def save_with_memory(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write all weights of a model, and what its memories are, into one file.

    Other ways of saving keep weights alone: a plain `from_pretrained` of what `save_pretrained`
    wrote builds the model without memories, and silently drops their weights. This file says
    where each memory lies, with which sizes, and which parameters are shared. It is written whole
    or not at all: an old file of that name stays until the new one is complete.

    Args:
        model: any model whose memories are `ProductKeyMemory` or `FlatKeyMemory` layers.
        path: the file; its folder must exist.

    Raises:
        TypeError: if a memory is of a class derived from those, which could not be built again.
        OSError: if the file cannot be written, a full disk for example.
    """
    memories = {
        name: {"kind": type(layer).__name__, "arguments": layer.arguments()}
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, _KeyValueMemory) and _buildable(name, layer)
    }
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "memories": memories,
        "shared": _shared(model),
        "state": dict(model.state_dict()),
    }
    write_tensors(Path(path), content)


def load_with_memory(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Put the memories saved by `save_with_memory` into a model, and load all weights.

    Args:
        model: the same model without memories, freshly built (of Hugging Face's, from the same
            config), or one that has them already. Changed in place, on its own device.
        path: a file written by `save_with_memory`. Nothing in it is executed.

    Returns:
        The model: every parameter and buffer has the saved bits, and what was shared is shared.

    Raises:
        ValueError: if the file is none of `save_with_memory`, or was saved from a model of
            another configuration. The model is as it was then.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    content = read_tensors(path, _FORMAT, _VERSION)
    saved: dict[str, Tensor] = content["state"]
    memories = {
        name: _built(model, name, saved, **spec) for name, spec in content["memories"].items()
    }
    _check_same(_expected_state(model, memories), saved, path)
    for name, memory in memories.items():
        memory.train(model.get_submodule(name).training)
        if model.get_submodule(name) is not memory:
            put_memory(model, name, memory)
    for names in content["shared"]:
        for name in names[1:]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(names[0]))
    model.load_state_dict(saved)
    return model


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data and tensors as `torch.save` does: the whole file or nothing.

    Raises:
        OSError: if the file cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(dict(content), file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # the reason, which torch hides
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def read_tensors(path: Path, form: str, version: int) -> dict[str, Any]:
    """Read what `write_tensors` wrote, with "format" and "version" among it.

    Raises:
        ValueError: if the file is broken, or of another format or version.
        OSError: if the file cannot be read.
    """
    with path.open("rb"):
        pass  # a file that is missing or may not be read is said as such
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no file of {form}, or broken: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{str(path)!r} is no file of {form}")
    if content.get("version") != version:
        raise ValueError(
            f"{str(path)!r} has version {content.get('version')}, but this reads version {version}"
        )
    return content


def _buildable(name: str, layer: _KeyValueMemory) -> bool:
    if _KINDS.get(type(layer).__name__) is not type(layer):
        raise TypeError(
            f"the memory {name!r} is a {type(layer).__name__}, but only "
            f"{' and '.join(_KINDS)} can be saved with what they are"
        )
    return True


def _shared(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [each for each in names.values() if len(each) > 1]


def _built(
    model: nn.Module, name: str, saved: Mapping[str, Tensor], kind: str, arguments: dict[str, Any]
) -> _KeyValueMemory:
    """The memory `name`: the model's own if it is there already, else one of the saved dtypes."""
    try:
        present = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model has no module {name!r}, where a memory was saved") from None
    if isinstance(present, _KeyValueMemory):
        if type(present).__name__ != kind or present.arguments() != arguments:
            raise ValueError(
                f"the model's memory {name!r} is {type(present).__name__} {present.arguments()}, "
                f"but the saved one is {kind} {arguments}"
            )
        return present
    device = next((p.device for p in present.parameters()), torch.device("cpu"))
    with torch.device("meta"):
        memory = _KINDS[kind](**arguments)
    for key, tensor in memory.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(saved[f"{name}.{key}"].dtype)
    return memory.to_empty(device=device)


def _expected_state(model: nn.Module, memories: Mapping[str, _KeyValueMemory]) -> dict[str, Tensor]:
    """What the state of the model will be once the memories are in their places."""
    gone = [*memories, *(name for place in memories for name in absorbed_modules(model, place))]
    state = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in gone)
    }
    for name, memory in memories.items():
        state |= {f"{name}.{key}": tensor for key, tensor in memory.state_dict().items()}
    return state


def _check_same(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    for key in sorted({*expected, *saved}):
        if key not in saved or key not in expected:
            raise ValueError(
                f"{str(path)!r} was saved from a model of another configuration: "
                f"{key!r} is in the {'file' if key in saved else 'model'} only"
            )
        ours, theirs = expected[key], saved[key]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{str(path)!r} was saved from a model of another configuration: {key!r} is "
                f"{theirs.dtype} {list(theirs.shape)} there, but {ours.dtype} "
                f"{list(ours.shape)} in the model"
            )
