"""FBGEMM's table-batched embedding, where it is installed: what recommenders gather rows with."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


def is_installed() -> bool:
    """Whether the package fbgemm_gpu is there; does not import it."""
    return find_spec("fbgemm_gpu") is not None


def make_gather(values: Tensor, slots: Tensor) -> Callable[[Tensor], Tensor]:
    """FBGEMM's sum of rows for weights [T, R], float32; its table is a copy of values [K, d_v].

    Args:
        values: [K, d_v].
        slots: [T, R].
    """
    from fbgemm_gpu.split_embedding_configs import (  # pyright: ignore[reportMissingImports]
        SparseType,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (  # pyright: ignore[reportMissingImports]
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # pyright: ignore[reportMissingImports]
        DenseTableBatchedEmbeddingBagsCodegen,
    )

    precision = SparseType.from_dtype(values.dtype)
    table = DenseTableBatchedEmbeddingBagsCodegen(
        [(values.shape[0], values.shape[1])],
        weights_precision=precision,
        pooling_mode=PoolingMode.SUM,
        use_cpu=values.device.type == "cpu",
        output_dtype=precision,
    )
    with torch.no_grad():
        table.weights.copy_(values.flatten())
    tokens, reads = slots.shape
    indices = slots.flatten().long()
    offsets = torch.arange(tokens + 1, device=slots.device) * reads
    return lambda weights: table(indices, offsets, weights.flatten().float())
