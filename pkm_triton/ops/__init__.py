"""The public ops. Each is a plain function that checks and flattens (`lookups`, `tables`).

Below it is the Function that differentiates it (`lookups`, `table_functions`), and below that the
operator of torch.library that runs either backend (`lookup_operators`, `table_operators`).
"""

from .lookups import flat_key_topk, product_key_topk
from .tables import gather_gated_values, gather_values, sample_values, scatter_values

__all__ = [
    "flat_key_topk",
    "gather_gated_values",
    "gather_values",
    "product_key_topk",
    "sample_values",
    "scatter_values",
]
