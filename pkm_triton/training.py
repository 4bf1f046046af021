"""Help with training: parameter groups (paper 4.3), and usage while a model runs (paper 4.2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._checks import check_positive
from .memory import _KeyValueMemory
from .usage import MemoryUsage


def param_groups(
    model: nn.Module, lr: float = 2.5e-4, value_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: memory values, which learn faster, and the rest.

    Values get sparse updates, so the paper (4.3) gives them a higher learning rate.

    Args:
        model: any module; its memory layers are found wherever they are.
        lr: learning rate of everything but values.
        value_lr: learning rate of the memory layers' values.

    Returns:
        [{"params": rest, "lr": lr}, {"params": values, "lr": value_lr}], of the parameters that
        require a gradient, each once; a group without parameters is left out.

    Raises:
        ValueError: if a learning rate is not above 0, or no parameter requires a gradient.
    """
    check_positive("lr", lr)
    check_positive("value_lr", value_lr)
    layers = [module for module in model.modules() if isinstance(module, _KeyValueMemory)]
    value_ids = {id(layer.values) for layer in layers}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in trained if id(p) not in value_ids], "lr": lr},
        {"params": [p for p in trained if id(p) in value_ids], "lr": value_lr},
    ]
    return [group for group in groups if group["params"]]


@contextmanager
def track_usage(model: nn.Module) -> Iterator[dict[str, MemoryUsage]]:
    """Count what every memory of a model reads, while the `with` block lasts.

    Args:
        model: any module; its memory layers are found wherever they are.

    Yields:
        A `MemoryUsage` for each memory layer, by the layer's name in the model. Blocks may be
        nested or overlap: each counts what is read while it lasts.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _KeyValueMemory)
    }
    usages = {name: MemoryUsage(layer.num_slots) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.usages.append(usages[name])
    try:
        yield usages
    finally:
        for name, layer in layers.items():
            layer.usages.remove(usages[name])
