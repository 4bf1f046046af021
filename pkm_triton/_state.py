"""What of a model's state a file can hold, and under which names."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

EXTRA_STATE = "_extra_state"
# What torch.compile and torch's checkpoint_wrapper call the module within.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within what torch.compile, checkpointing and data parallelism put around it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = next((name for name in _WRAPPED if name in model._modules), None)
        if isinstance(model, wrappers):
            model = model.module
        elif inner is not None:
            model = model.get_submodule(inner)
        else:
            return model


def plain_name(name: str) -> str:
    """A name without what torch.compile and checkpointing add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def is_plain(part: Any) -> bool:
    """Whether a part of a state is a tensor of torch's own, laid out in the common way."""
    return type(part) in (Tensor, nn.Parameter) and part.layout == torch.strided


def is_sharded(part: Any) -> bool:
    """Whether a part of a state lies over ranks."""
    return hasattr(part, "full_tensor")


def has_shards(model: nn.Module) -> bool:
    """Whether a part of a model's state lies over ranks."""
    return any(map(is_sharded, model.state_dict().values()))


def savable(key: str, part: Any) -> Any:
    """A part of a state as it goes into a file.

    Raises:
        TypeError: if it is neither a plain tensor or DTensor nor, as extra state, plain data.
    """
    if key.endswith(EXTRA_STATE) and _is_data(part):
        return part
    if not is_plain(part) and not is_sharded(part):
        raise TypeError(
            f"the state {key!r} is a {type(part).__name__}, but must be a plain tensor or DTensor, "
            "or as extra state plain data: of other sharded tensors gather the full state first"
        )
    if part.is_meta:
        raise TypeError(f"the state {key!r} is on the meta device, and holds nothing to save")
    if is_sharded(part):
        return part
    overlaps = part.numel() * part.element_size() > part.untyped_storage().nbytes()
    return part.contiguous() if overlaps else part


def _is_data(part: Any) -> bool:
    if isinstance(part, dict):
        return all(_is_data(each) for pair in part.items() for each in pair)
    if isinstance(part, (list, tuple)):
        return all(_is_data(each) for each in part)
    return part is None or type(part) in (bool, int, float, str, bytes) or is_plain(part)


def shared(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(plain_name(name))
    return [each for each in names.values() if len(each) > 1]
