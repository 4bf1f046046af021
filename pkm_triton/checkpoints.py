"""Save a model with its memories in one file, and bring it back bitwise."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._files import read_tensors, write_tensors
from ._kinds import described
from ._layer_checks import check_group, check_module, check_path
from ._saved_model import SavedModel
from ._state import has_shards, is_plain, is_sharded, plain_name, savable, shared, unwrapped
from .memory import _KeyValueMemory
from .replace import absorbed_modules, put_memory
from .sharing import pool_equals

__all__ = ["load_with_memory", "read_tensors", "save_with_memory", "write_tensors"]

_FORMAT = "pkm_triton model with memory"
_VERSION = 2


def save_with_memory(model: nn.Module, path: str | os.PathLike[str], group: Any = None) -> None:
    """Write all weights of a model, and what its memories are, into one file.

    Other ways of saving keep weights alone: a plain `from_pretrained` of what `save_pretrained`
    wrote builds the model without memories, and silently drops their weights (`pkm_triton.hf` has
    another way). This file says where each memory lies, with which sizes, and which parameters and
    memories are shared. It has a checksum for every tensor, and is written whole or not at all: an
    old file of that name stays until the new one is complete.

    Of a model with DTensors, as `distributed.shard_memory` and `fully_shard` make them, all ranks
    must call, and the first writes the file. The others send it theirs block by block: no rank ever
    holds more than its shards and a block. `torch.distributed.checkpoint`, to which all ranks write
    at a time, is faster.

    Args:
        model: any model whose memories are `ProductKeyMemory`, `FlatKeyMemory` or
            `ProductKeyExperts` layers. What `torch.compile`, `checkpoint_wrapper` or a
            data-parallel wrapper put around it, or around parts of it, is left out.
        path: the file; its folder must exist. It is one of `torch.save`, so its name may end in
            anything but ".safetensors", by which other libraries choose how to read a file.
        group: of a sharded model: the process group of all its ranks; None: the default.

    Raises:
        ValueError: if the name ends in ".safetensors", or, on all ranks, if ranks of a sharded
            model differ, or some are not in the group.
        TypeError: if a memory is of a class derived from those, or has an adapter within, so that
            it could not be built again, or a part of the state is neither a plain tensor or
            DTensor nor, as extra state, plain data.
        OSError: if the file cannot be written, a full disk for example.
    """
    check_module("model", model)
    check_group(group)

    def prepared() -> tuple[Path, dict[str, Any]]:
        if check_path(path).suffix.lower() == ".safetensors":
            raise ValueError(
                f"path is {os.fspath(path)!r}, but this writes a file of torch.save: let its name "
                "end in '.pt' (safetensors are written by pkm_triton.hf)"
            )
        return Path(path), _content(model)

    model = unwrapped(model)
    if not has_shards(model):
        write_tensors(*prepared())
        return
    from .distributed.one_file import together, write_sharded_tensors

    write_sharded_tensors(*together(prepared, group), group)


def load_with_memory(
    model: nn.Module, path: str | os.PathLike[str], group: Any = None
) -> nn.Module:
    """Put the memories saved by `save_with_memory` into a model, and load all weights.

    Args:
        model: the same model without memories, freshly built (of Hugging Face's, from the same
            config), or one that has them already. Changed in place, on its own device.
            Of one with DTensors all ranks must call; each takes its own part of the file, of
            whichever layout that was written.
        path: a file written by `save_with_memory`. Nothing in it is executed.
        group: of a sharded model: the process group of all its ranks; None: the default.

    Returns:
        The model: every parameter and buffer has the saved bits, and what was shared is shared.

    Raises:
        ValueError: if the file is none of `save_with_memory`, is damaged, or was saved from a model
            of another configuration, or the model has parameters on the meta device, or quantised
            ones, shares parameters which the file has apart, or is compiled, or wrapped for
            checkpointing, where a memory is to go. The model is as it was.
        OSError: if the file cannot be read.
    """
    check_module("model", model)
    check_group(group)
    whole, model = model, unwrapped(model)
    if has_shards(model):
        from .distributed.one_file import fill, rank_and_ranks, together

        found = together(lambda: _prepared(model, path, rank_and_ranks(group)), group)
        _put(model, *found, fill)
    else:
        _put(model, *_prepared(model, path, (0, 1)))
    return whole


def _content(model: nn.Module) -> dict[str, Any]:
    """What a file holds of a model."""
    names: dict[_KeyValueMemory, list[str]] = defaultdict(list)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _KeyValueMemory):
            names[layer].append(plain_name(name))
    state = {plain_name(key): savable(key, part) for key, part in model.state_dict().items()}
    ties = shared(model)
    for first, *others in ties:
        if is_sharded(state[first]):
            state |= dict.fromkeys(others, state[first])  # one object, as one storage is elsewhere
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "memories": [{"names": each, **described(each[0], layer)} for layer, each in names.items()],
        "shared": ties,
        "state": state,
    }


def _prepared(
    model: nn.Module, path: str | os.PathLike[str], share: tuple[int, int]
) -> tuple[SavedModel, dict[str, _KeyValueMemory]]:
    """What a file holds, and the memories to be put into a model, of which all is checked."""
    path = check_path(path)
    content = read_tensors(path, _FORMAT, _VERSION, plain=1, share=share)
    try:
        saved = SavedModel(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is broken: {error}") from None
    _check_takes_tensors(model)
    memories = {}
    for names, kind, arguments in saved.memories:
        memory = _found(model, names, kind, arguments, path)
        memories |= dict.fromkeys(names, memory)
    _check_same(_expected_state(model, memories, saved.state), saved.state, path)
    _check_ties(model, memories, saved.shared, path)
    return saved, memories


def _put(
    model: nn.Module,
    saved: SavedModel,
    memories: Mapping[str, _KeyValueMemory],
    fill: Callable[[Any, Tensor], None] | None = None,
) -> None:
    """Put memories and state into a model; DTensors by `fill`."""
    for name, memory in memories.items():
        replaced = model.get_submodule(name)
        if replaced is memory:
            continue
        if next(memory.parameters()).is_meta:
            device = next((p.device for p in replaced.parameters()), torch.device("cpu"))
            memory.to_empty(device=device).train(replaced.training)
        put_memory(model, name, memory)
    for names in saved.shared:
        for name in names[1:]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(names[0]))
    pool_equals(memories.values())
    state = dict(saved.state)
    again = {name for names in saved.shared for name in names[1:]}
    for key, part in model.state_dict().items():
        if fill is not None and is_sharded(part):
            if key not in again:
                fill(part, state[key])
            state[key] = part
    model.load_state_dict(state)


def _check_takes_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"model has {name!r} on the meta device: give it memory first, as "
                "model.to_empty(device='cpu') does"
            )
        if not is_plain(tensor.detach()) and not is_sharded(tensor):
            raise ValueError(
                f"model has {name!r} as a {type(tensor.detach()).__name__}, but must have plain "
                "tensors or DTensors: load first, then quantise"
            )


def _found(
    model: nn.Module,
    names: Iterable[str],
    kind: type[_KeyValueMemory],
    arguments: dict[str, Any],
    path: Path,
) -> _KeyValueMemory:
    """The memory of those names: the model's own if it is there already, else one without data."""
    memory = None
    for name in names:
        try:
            present = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"model has no module {name!r}, where {str(path)!r} has a memory"
            ) from None
        if not isinstance(present, _KeyValueMemory):
            parent, _, attribute = name.rpartition(".")
            if attribute not in model.get_submodule(parent)._modules:
                raise ValueError(
                    f"model is compiled, or wrapped for checkpointing, around {name!r}, where "
                    f"{str(path)!r} has a memory: load first"
                )
            continue
        if type(present) is not kind or present.arguments() != arguments:
            raise ValueError(
                f"the model's memory {name!r} is {type(present).__name__} {present.arguments()}, "
                f"but the saved one is {kind.__name__} {arguments}"
            )
        memory = memory or present
    if memory is not None:
        return memory
    try:
        return kind(**{**arguments, "device": "meta"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} is broken: no memory can be so: {error}") from None


def _expected_state(
    model: nn.Module, memories: Mapping[str, _KeyValueMemory], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """What the state of the model will be once the memories are in their places.

    A memory without data is given the saved dtypes.
    """
    gone = [*memories, *(name for place in memories for name in absorbed_modules(model, place))]
    state = {
        key: part
        for key, part in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in gone)
    }
    for name, memory in memories.items():
        for key, tensor in memory.state_dict(keep_vars=True).items():
            theirs = saved.get(f"{name}.{key}")
            if tensor.is_meta and theirs is not None and theirs.is_floating_point():
                tensor.data = tensor.data.to(theirs.dtype)
            state[f"{name}.{key}"] = tensor
    return state


def _check_same(expected: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    for key in sorted({*expected, *saved}):
        if key not in saved or key not in expected:
            raise ValueError(
                f"{str(path)!r} was saved from a model of another configuration: "
                f"{key!r} is in the {'file' if key in saved else 'model'} only"
            )
        ours, theirs = expected[key], saved[key]
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            continue  # extra state, whose meaning is the module's
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{str(path)!r} was saved from a model of another configuration: {key!r} is "
                f"{theirs.dtype} {list(theirs.shape)} there, but {ours.dtype} "
                f"{list(ours.shape)} in the model"
            )


def _check_ties(
    model: nn.Module,
    memories: Mapping[str, _KeyValueMemory],
    shared: list[list[str]],
    path: Path,
) -> None:
    """What the file shares are parameters, and the model shares nothing else."""
    gone = [*memories, *(name for place in memories for name in absorbed_modules(model, place))]
    names: dict[int, list[str]] = defaultdict(list)
    for wrapped, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(wrapped)
        if not any(name.startswith(f"{each}.") for each in gone):
            names[id(parameter)].append(name)
    for place, memory in memories.items():
        for name, parameter in memory.named_parameters():
            names[id(parameter)].append(f"{place}.{name}")
    every = {name for each in names.values() for name in each}
    for each in shared:
        for name in each:
            if name not in every:
                raise ValueError(f"{str(path)!r} is broken: {name!r} is no parameter of the model")
    groups = [set(each) for each in shared]
    for each in names.values():
        if len(each) > 1 and not any(set(each) <= group for group in groups):
            raise ValueError(
                f"the model shares one parameter between {' and '.join(map(repr, each))}, which "
                f"{str(path)!r} has apart"
            )
