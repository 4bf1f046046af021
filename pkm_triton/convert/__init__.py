"""Checkpoints of other product-key memories, into our layers and back, by key and shape.

The layouts are those of XLM's `HashingMemory` (the original implementation), of
facebookresearch/memory, and of the package `product-key-memory`.
"""

from .lucidrains import from_lucidrains, to_lucidrains
from .meta import from_meta, to_meta
from .xlm import from_xlm, to_xlm

__all__ = ["from_lucidrains", "from_meta", "from_xlm", "to_lucidrains", "to_meta", "to_xlm"]
