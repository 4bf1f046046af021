"""Triton kernels of product-key memory, one op a file."""

from .flat_key_topk import flat_key_topk
from .gather_values import gather_values
from .product_key_topk import product_key_topk

__all__ = ["flat_key_topk", "gather_values", "product_key_topk"]
