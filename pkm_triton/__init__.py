"""Product-key memory for PyTorch: Triton kernels, a layer, and a perf harness."""

from . import optim
from ._backend import backend, use_backend
from .memory import FlatKeyMemory, ProductKeyMemory
from .ops import flat_key_topk, gather_values, product_key_topk
from .query import QueryNetwork
from .training import param_groups
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
    "optim",
    "param_groups",
    "product_key_topk",
    "use_backend",
]
