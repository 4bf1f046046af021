"""The layers we compare with: the paper in plain PyTorch, and the package `product-key-memory`."""

import math

import torch
from torch import Tensor, nn

FLAT_CHUNK_BYTES = 16 * 2**20
"""Scores of flat keys are made in chunks of about this size: enough to keep the product efficient,
small enough to be selected from while they are in the cache."""


class TextbookMemory(nn.Module):
    """Memory with product or flat keys as the paper's section 3 says it, on stock PyTorch ops.

    All heads at once, `torch.topk` over each codebook, all k² candidate pairs, `F.embedding_bag`.
    Flat keys are scored in chunks, and only the best k of each chunk are kept.

    Args:
        query_net: module from [..., dim] to queries [..., heads, query_dim].
        value_dim: width of a value, d_v.
        keys: `product` or `flat`.
        num_subkeys: |C|; the memory has K = |C|² slots.
        heads: heads of the query network.
        top_k: slots read per head, at most |C| with product keys.
        query_dim: width of one head's query.
        sparse_grad: whether the gradient of the values is a sparse tensor.
        device: where the parameters are made.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        query_net: nn.Module,
        value_dim: int,
        *,
        keys: str,
        num_subkeys: int,
        heads: int,
        top_k: int,
        query_dim: int,
        sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_net = query_net
        self.top_k = top_k
        self.num_subkeys = num_subkeys
        if keys == "product":
            shape = (heads, 2, num_subkeys, query_dim // 2)
        else:
            shape = (heads, num_subkeys**2, query_dim)
        bound = 1 / math.sqrt(shape[-1])
        self.keys = nn.Parameter(
            torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound)
        )
        self.values = nn.EmbeddingBag(
            num_subkeys**2, value_dim, mode="sum", sparse=sparse_grad, device=device, dtype=dtype
        )
        nn.init.normal_(self.values.weight, std=value_dim**-0.5)

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax weights and slots [T, H, k] of the best keys for queries [T, H, d_q]."""
        if self.keys.ndim == 4:
            scores, slots = self._product_topk(query)
        else:
            scores, slots = self._flat_topk(query)
        return scores.softmax(-1), slots

    def gather(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum [T, d_v] of the values at slots [T, H, k]."""
        return self.values(slots.flatten(1), per_sample_weights=weights.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory: x [T, dim] to [T, d_v]."""
        weights, slots = self.lookup(self.query_net(x))
        return self.gather(slots, weights)

    def _product_topk(self, query: Tensor) -> tuple[Tensor, Tensor]:
        tokens, heads, _ = query.shape
        halves = query.reshape(tokens, heads, 2, -1)
        scores = torch.einsum("thpd,hpnd->thpn", halves, self.keys)
        best, index = scores.topk(self.top_k, dim=-1)
        pairs = best[:, :, 0, :, None] + best[:, :, 1, None, :]
        scores, pair = pairs.flatten(-2).topk(self.top_k, dim=-1)
        first = index[:, :, 0].gather(-1, pair // self.top_k)
        second = index[:, :, 1].gather(-1, pair % self.top_k)
        return scores, first * self.num_subkeys + second

    def _flat_topk(self, query: Tensor) -> tuple[Tensor, Tensor]:
        tokens = query.shape[0]
        per_head = [
            self._flat_topk_of_head(query[:, head], keys, max(1, FLAT_CHUNK_BYTES // (4 * tokens)))
            for head, keys in enumerate(self.keys)
        ]
        scores, slots = zip(*per_head, strict=True)
        return torch.stack(scores, 1), torch.stack(slots, 1)

    def _flat_topk_of_head(self, query: Tensor, keys: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Best k of one head: query [T, d_q], keys [K, d_q] -> [T, k] and [T, k]."""
        scores: list[Tensor] = []
        slots: list[Tensor] = []
        for start in range(0, keys.shape[0], chunk):
            part = query @ keys[start : start + chunk].T
            best, index = part.topk(min(self.top_k, part.shape[-1]), dim=-1)
            scores.append(best)
            slots.append(index + start)
        best, index = torch.cat(scores, -1).topk(self.top_k, dim=-1)
        return best, torch.cat(slots, -1).gather(-1, index)


class PackageMemory(nn.Module):
    """The layer of the package `product-key-memory`, taking x [T, dim] as the others do.

    It differs in three ways that cannot be turned off: the query's projection has no bias, the
    layer norm spans half a head's query, and the gradient of the values is dense by default
    (`sparse_grad` sets the flag of its `nn.EmbeddingBag`).

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_subkeys: int,
        heads: int,
        top_k: int,
        query_dim: int,
        sparse_grad: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        from product_key_memory import PKM  # pyright: ignore[reportMissingImports]

        layer = PKM(dim, heads=heads, num_keys=num_subkeys, topk=top_k, dim_head=query_dim // 2)
        layer.values.sparse = sparse_grad
        self.layer = layer.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Read the memory: x [T, dim] to [T, dim]."""
        return self.layer(x[None])[0]
