"""Triton kernels of product-key memory, one op a file."""

from .flat_key_topk import flat_key_topk, flat_key_topk_backward
from .gather_values import gather_values
from .product_key_topk import product_key_topk, product_key_topk_backward
from .sample_values import sample_values
from .scatter_adam import scatter_adam
from .scatter_values import (
    gather_values_backward,
    gather_values_backward_sparse,
    scatter_values,
    scatter_values_sparse,
)
from .sparse_adam import sparse_adam

__all__ = [
    "flat_key_topk",
    "flat_key_topk_backward",
    "gather_values",
    "gather_values_backward",
    "gather_values_backward_sparse",
    "product_key_topk",
    "product_key_topk_backward",
    "sample_values",
    "scatter_adam",
    "scatter_values",
    "scatter_values_sparse",
    "sparse_adam",
]
