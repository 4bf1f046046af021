"""Product-key memory for PyTorch: Triton kernels, a layer, and a perf harness."""

from . import optim, transformer
from ._backend import backend, use_backend
from .checkpoints import load_with_memory, save_with_memory
from .memory import FlatKeyMemory, ProductKeyMemory
from .ops import flat_key_topk, gather_values, product_key_topk
from .query import QueryNetwork, synchronise_batch_norm
from .replace import replace_ffn
from .training import param_groups, track_usage
from .usage import MemoryUsage

__version__ = "0.1.0"

__all__ = [
    "FlatKeyMemory",
    "MemoryUsage",
    "ProductKeyMemory",
    "QueryNetwork",
    "backend",
    "flat_key_topk",
    "gather_values",
    "load_with_memory",
    "optim",
    "param_groups",
    "product_key_topk",
    "replace_ffn",
    "save_with_memory",
    "synchronise_batch_norm",
    "track_usage",
    "transformer",
    "use_backend",
]
