"""Put memories into models of transformers, and describe them in their config."""

import functools
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pkm_triton import sharing
from pkm_triton._kinds import KINDS, described
from pkm_triton._layer_checks import check_list
from pkm_triton._state import plain_name
from pkm_triton.memory import ProductKeyMemory, _KeyValueMemory
from pkm_triton.replace import check_no_memory, put_memory, replace_ffn

from .config import MemoryConfig, write

BEFORE_SAVING = (
    "before saving call merge_slots, and take out what was compiled, parametrized or adapted; "
    "from_config makes models without memories"
)


def add_memories(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    part: str = "",
    ffn: str = "mlp",
    kind: type[_KeyValueMemory] = ProductKeyMemory,
    share_values: bool = False,
    **options: Any,
) -> list[nn.Module]:
    """Replace the FFN of some layers by memories, and write them into the model's config.

    `save_pretrained` then writes them with the weights, and where `pkm_triton.hf` is imported
    `from_pretrained` brings the model back bitwise; elsewhere it fails, and names this package.

    Args:
        model: a model of transformers, as it will be saved; changed in place.
        layers: which, counted from 1 (see `pkm_triton.transformer.memory_layers`); at least one,
            and none that has a memory.
        part: name of the part of the model that is meant, where several have such layers:
            "encoder", "model.language_model"; by default the whole.
        ffn: name of the FFN within a layer (see `replace_ffn`).
        kind: `ProductKeyMemory`, `FlatKeyMemory` or `ProductKeyExperts`.
        share_values: whether the memories share one table of values (experts both tables).
        **options: arguments of `kind` but for `dim` and `dtype`, which are the model's.

    Returns:
        The memories, in the order of the layers.

    Raises:
        TypeError: if the model is none of transformers, or an option unknown or of the wrong type.
        ValueError: if a part, a layer, the FFN or an option does not fit (see `replace_ffn`). The
            model is as it was then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, not {type(model).__name__}")
    if kind not in KINDS.values():
        raise TypeError(f"kind must be {' or '.join(KINDS)}, not {kind!r}")
    if not isinstance(share_values, bool):
        raise TypeError(f"share_values is {share_values!r}, but must be True or False")
    layers = tuple(check_list("layers", layers))
    if not layers:
        raise ValueError("layers is empty, but must name at least one layer, counted from 1")
    allowed = _options(kind)
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name!r} is no option of {kind.__name__}: {', '.join(allowed)}")
    within = _part(model, part)
    check_no_memory(within, layers, ffn)
    dim = getattr(within, "config", model.config).get_text_config().hidden_size
    first: list[_KeyValueMemory] = []

    def make() -> _KeyValueMemory:
        memory = kind(dim, **options)
        first.append(memory)
        if share_values:
            sharing.share_values(first)
        return memory

    memories = replace_ffn(within, layers, make, ffn=ffn)
    if share_values:
        sharing.share_values(first)  # they were moved to a device and dtype one by one
    write_config(model)
    return memories


def _part(model: nn.Module, part: str) -> nn.Module:
    if not isinstance(part, str):
        raise TypeError(f"part must be a name, not {part!r}")
    try:
        return model.get_submodule(part)
    except AttributeError:
        names = ", ".join(repr(name) for name, _ in model.named_children())
        raise ValueError(
            f"part is {part!r}, but model has no such module; it has {names}"
        ) from None


def _options(kind: type[nn.Module]) -> list[str]:
    """The options of a kind of memory, those that it hands to its bases among them."""
    names: dict[str, None] = {}
    for each in kind.__mro__:
        if issubclass(each, _KeyValueMemory) and "__init__" in vars(each):
            for name, parameter in inspect.signature(each).parameters.items():
                if parameter.kind is not parameter.VAR_KEYWORD and name not in ("dim", "dtype"):
                    names[name] = None
    return list(names)


def write_config(model: PreTrainedModel) -> None:
    """Write the memories that a model has into its config, for `save_pretrained`.

    `add_memories` does this. Call it yourself for memories put in otherwise, or after changing
    which tables they share or their dtypes.

    Args:
        model: a model of transformers. What `torch.compile` or `checkpoint_wrapper` put around
            parts of it is left out.

    Raises:
        TypeError: if the model is none of transformers, or a memory is of a class of your own, or
            has an adapter within, so that it could not be built again.
        ValueError: if the model has no memories, or one memory stands in two places; two may share
            their values.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, not {type(model).__name__}")
    names: dict[_KeyValueMemory, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        name = plain_name(name)
        if isinstance(module, _KeyValueMemory):
            if module in names:
                raise ValueError(
                    f"one memory stands at {names[module]!r} and at {name!r}, which transformers "
                    "cannot save: give each layer its own, and let them share their values"
                )
            names[module] = name
    if not names:
        raise ValueError("model has no memories to write into its config")
    groups: dict[int, list[str]] = defaultdict(list)
    for module, name in names.items():
        for key, parameter in module.named_parameters():
            groups[id(parameter)].append(f"{name}.{key}")
    memories = [
        {
            "name": name,
            **described(name, module),
            "dtypes": {
                key: str(tensor.dtype).removeprefix("torch.")
                for key, tensor in module.state_dict().items()
                if tensor.is_floating_point() and tensor.dtype != model.dtype
            },
        }
        for module, name in names.items()
    ]
    shared = [each for each in groups.values() if len(each) > 1]
    tie(model, shared)
    write(model, MemoryConfig(memories, shared, str(model.dtype).removeprefix("torch.")))


def build(model: PreTrainedModel, config: MemoryConfig, dtype: torch.dtype | None) -> None:
    """Put the memories of a config into a model that is being loaded, without data.

    Args:
        model: its skeleton.
        config: the memories.
        dtype: what the model is loaded in; by default its own.

    Raises:
        ValueError: if the model has no such modules.
    """
    dtype = dtype or getattr(torch, config.dtype)
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    built = {}
    for memory in config.memories:
        kind = KINDS.get(memory["kind"])
        if kind is None:
            raise ValueError(f"config names the kind {memory['kind']!r}, not {' or '.join(KINDS)}")
        made = kind(**memory["arguments"], device="meta", dtype=dtype)
        for key, other in memory["dtypes"].items():
            parent, _, attribute = key.rpartition(".")
            tensor = getattr(made.get_submodule(parent), attribute)
            tensor.data = tensor.data.to(getattr(torch, other))
        # The config may be of a model with a head, or of one without.
        name = memory["name"]
        spellings = (name, name.removeprefix(prefix), prefix + name)
        place = next((each for each in spellings if each in modules), None)
        if place is None:
            raise ValueError(f"config has a memory at {name!r}, which the model has not")
        made.train(modules[place].training)
        # Until it is loaded; deleted by `MemoryQuantizer.postprocess_model`.
        vars(made)["_initialise"] = functools.partial(_refuse, place, made)
        put_memory(model, place, made)
        built |= {f"{name}.{key}": f"{place}.{key}" for key, _ in made.named_parameters()}
    tie(model, [[built[name] for name in names] for names in config.shared])


def _refuse(place: str, memory: nn.Module, loaded: set[torch.Tensor]) -> None:
    """In place of initialising what was not loaded: a memory of a config has its weights."""
    tensors = (*memory.named_parameters(), *memory.named_buffers())
    # What is offloaded to a disk stays on the meta device; what the weights lack does not.
    lacking = [
        f"{place}.{name}" for name, each in tensors if each not in loaded and not each.is_meta
    ]
    if not lacking:
        return
    raise ValueError(
        f"the weights have no {', '.join(lacking)}, which the memory at {place!r} has, as the "
        f"config has it: {BEFORE_SAVING}"
    )


def tie(model: PreTrainedModel, shared: Sequence[Sequence[str]]) -> None:
    """Tell transformers which names stand for one parameter of the memories."""
    tied = {name: names[0] for names in shared for name in names[1:]}
    if tied:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **tied}
