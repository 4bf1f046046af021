"""Help with training: parameter groups (paper 4.3), and usage while a model runs (paper 4.2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._layer_checks import check_module
from ._optimizer_options import check_number
from .memory import _KeyValueMemory
from .usage import MemoryUsage


def param_groups(
    model: nn.Module,
    lr: float = 2.5e-4,
    value_lr: float = 1e-3,
    weight_decay: float | None = None,
    value_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: memory values, which learn faster, and the rest.

    Values get sparse updates, so the paper (4.3) gives them a higher learning rate.

    Args:
        model: any module; its memory layers are found wherever they are.
        lr: learning rate of everything but values; 0 or more.
        value_lr: learning rate of the memory layers' values.
        weight_decay: of everything but values; None: the optimiser's own.
        value_weight_decay: of the memory layers' values. A row decays in the steps that touch it:
            with dense gradients in all, with sparse ones in those that read it.

    Returns:
        [{"params": rest, "lr": lr}, {"params": values, "lr": value_lr}], and "weight_decay" where
        it is given, of the parameters that require a gradient, each once; a group without
        parameters is left out.

    Raises:
        TypeError: if model is no module, or an option no number.
        ValueError: if an option is negative or not finite, or no parameter requires a gradient.
    """
    check_module("model", model)
    options = {"lr": lr}, {"lr": value_lr}
    for name, value in (("lr", lr), ("value_lr", value_lr)):
        check_number(name, value)
    decays = ("weight_decay", weight_decay), ("value_weight_decay", value_weight_decay)
    for group, (name, value) in zip(options, decays, strict=True):
        if value is not None:
            check_number(name, value)
            group["weight_decay"] = value
    layers = [module for module in model.modules() if isinstance(module, _KeyValueMemory)]
    value_ids = {id(table) for layer in layers for table in table_parameters(layer)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in trained if id(p) not in value_ids], **options[0]},
        {"params": [p for p in trained if id(p) in value_ids], **options[1]},
    ]
    return [group for group in groups if group["params"]]


def table_parameters(layer: _KeyValueMemory) -> list[nn.Parameter]:
    """The parameters that are a memory's tables, or of which parametrizations make them."""
    made = [f"parametrizations.{name}.original" for name in layer.table_names]
    return [
        parameter
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if name in layer.table_names or name.rstrip("0123456789") in made
    ]


@contextmanager
def track_usage(model: nn.Module) -> Iterator[dict[str, MemoryUsage]]:
    """Count what every memory of a model reads, while the `with` block lasts.

    Args:
        model: any module; its memory layers are found wherever they are.

    Yields:
        A `MemoryUsage` for each memory layer, by the layer's name in the model. Blocks may be
        nested or overlap: each counts what is read while it lasts.

    Raises:
        TypeError: if model is no module.
    """
    check_module("model", model)
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
