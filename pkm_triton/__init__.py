"""Product-key memory for PyTorch: Triton kernels, a layer, and a perf harness.

A public name is imported when it is asked for, so that `pkm-perf --help` need not wait for torch.
`import pkm_triton.ops` registers the operators at once, as a process needs that loads an exported
program and uses nothing else of this package.

`importlib.reload(pkm_triton)` changes nothing for objects made before. Reloading its modules, or
importing all of it anew, makes new classes: layers made before go on computing and training, but
what looks for memories in a model (`param_groups`, `save_with_memory`, ...) does not know them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import convert, distributed, optim, presets, transformer
    from . import hf as hf
    from ._backend import backend, use_backend
    from .checkpoints import load_with_memory, save_with_memory
    from .compiling import warm_up
    from .experts import ProductKeyExperts
    from .memory import FlatKeyMemory, ProductKeyMemory
    from .ops import (
        flat_key_topk,
        gather_values,
        product_key_topk,
        sample_values,
        scatter_values,
    )
    from .query import QueryNetwork, synchronise_batch_norm
    from .replace import replace_ffn
    from .sharing import share_values
    from .slot_counts import SlotCounts, rank_slots
    from .slot_tuning import merge_slots, train_slots
    from .training import param_groups, track_usage
    from .usage import MemoryUsage

__version__ = "0.1.0"

__all__ = [
    "FlatKeyMemory",
    "MemoryUsage",
    "ProductKeyExperts",
    "ProductKeyMemory",
    "QueryNetwork",
    "SlotCounts",
    "backend",
    "convert",
    "distributed",
    "flat_key_topk",
    "gather_values",
    "load_with_memory",
    "merge_slots",
    "optim",
    "param_groups",
    "presets",
    "product_key_topk",
    "rank_slots",
    "replace_ffn",
    "sample_values",
    "save_with_memory",
    "scatter_values",
    "share_values",
    "synchronise_batch_norm",
    "track_usage",
    "train_slots",
    "transformer",
    "use_backend",
    "warm_up",
]

_MODULES = {
    "": ["convert", "distributed", "optim", "presets", "transformer"],
    "_backend": ["backend", "use_backend"],
    "checkpoints": ["load_with_memory", "save_with_memory"],
    "compiling": ["warm_up"],
    "experts": ["ProductKeyExperts"],
    "memory": ["FlatKeyMemory", "ProductKeyMemory"],
    "ops": [
        "flat_key_topk",
        "gather_values",
        "product_key_topk",
        "sample_values",
        "scatter_values",
    ],
    "query": ["QueryNetwork", "synchronise_batch_norm"],
    "replace": ["replace_ffn"],
    "sharing": ["share_values"],
    "slot_counts": ["SlotCounts", "rank_slots"],
    "slot_tuning": ["merge_slots", "train_slots"],
    "training": ["param_groups", "track_usage"],
    "usage": ["MemoryUsage"],
}
"""Where each name of `__all__` is defined, as the type checkers read above."""


_EXTRAS = ("hf",)
"""Packages that need what only an extra installs: no `import *` may ask for them."""


def __getattr__(name: str) -> Any:
    if name in _EXTRAS:
        return importlib.import_module(f".{name}", __name__)
    for module, names in _MODULES.items():
        if name in names:
            found = importlib.import_module(f".{module or name}", __name__)
            globals()[name] = getattr(found, name) if module else found
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXTRAS})
