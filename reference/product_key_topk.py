"""Product-key top-k: the k best of N² slots from two codebooks of N sub-keys (paper 3.1).

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    query [T, H, 2 D]; subkeys [H, 2, N, D]; scores, slots [T, H, k]; slot = i · N + j
"""

import functools
import math

import torch
from torch import Tensor

from .chunks import MAX_TEMPORARY_ELEMENTS, token_chunks
from .topk import matmul_full_float32, scoring_dtype, topk_last_dim

FEW_TOKENS = 4


@functools.lru_cache(maxsize=64)
def candidate_ranks(top_k: int, num_subkeys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs of ranks, from 0, that can be among the best `top_k` sums of two sorted lists.

    The pair of ranks (a, b), counted from 1, is beaten or equalled by the a·b - 1 pairs whose
    ranks are no worse in both lists, so only pairs with a·b <= k matter: 119 of 1024 at k = 32.

    Returns:
        Two tensors [C], int64: of each pair the rank in the first list, and the rank in the second
        plus the length of the first, so that both point into the two lists laid end to end.
    """
    per_half = min(top_k, num_subkeys)
    pairs = [
        (a - 1, per_half + b - 1)
        for a in range(1, per_half + 1)
        for b in range(1, min(top_k // a, per_half) + 1)
    ]
    first, second = torch.tensor(pairs, device=device).T.contiguous()
    return first, second


def product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` slots of highest score, exactly (paper equation 4 and the text below it).

    Args:
        query: [T, H, d_q].
        subkeys: [H, 2, N, d_q / 2].
        top_k: 1 <= top_k <= N².

    Returns:
        scores [T, H, top_k], descending, float32 (float64 if an input is), and slots
        [T, H, top_k], int32. A NaN among a query's sub-key scores makes all its scores NaN. The
        sum of +inf and -inf is -inf: a slot that either half rules out is ruled out.
    """
    heads, _, num_subkeys, width = subkeys.shape
    dtype = scoring_dtype(query, subkeys)
    if subkeys.dtype != dtype:
        subkeys = subkeys.to(dtype)
    keys = subkeys.view(2 * heads, num_subkeys, width).transpose(1, 2)
    ranks = candidate_ranks(top_k, num_subkeys, query.device)
    elements = heads * 2 * max(num_subkeys, ranks[0].numel())
    if query.shape[0] * elements <= MAX_TEMPORARY_ELEMENTS:
        wide = query if query.dtype == dtype else query.to(dtype)
        return _topk_of_chunk(wide, keys, ranks, top_k)
    chunks = [
        _topk_of_chunk(query[chunk].to(dtype), keys, ranks, top_k)
        for chunk in token_chunks(query.shape[0], elements)
    ]
    scores, slots = zip(*chunks, strict=True)
    return torch.cat(scores), torch.cat(slots)


def _topk_of_chunk(
    query: Tensor, keys: Tensor, ranks: tuple[Tensor, Tensor], top_k: int
) -> tuple[Tensor, Tensor]:
    """Scores and slots [t, H, k] of query [t, H, 2 D]; keys [2 H, D, N]; ranks two of [C]."""
    books, width, num_subkeys = keys.shape
    heads = books // 2
    per_half = min(top_k, num_subkeys)
    halves = query.view(-1, books, width).transpose(0, 1)
    # Not named, so that the scores, [2 H, t, N], are gone before the pairs are made.
    best, index = topk_last_dim(_scores(halves, keys), per_half)
    # A head's two lists end to end, [t, H, 2 k].
    best = best.transpose(0, 1).reshape(-1, heads, 2 * per_half)
    index = index.transpose(0, 1).reshape(-1, heads, 2 * per_half)
    first, second = (rank.expand(best.shape[0], heads, -1) for rank in ranks)
    sums = best.gather(-1, first) + best.gather(-1, second)
    scores, position = _best_sums(sums, best[..., ::per_half], top_k)
    row = index.gather(-1, ranks[0].take(position))
    column = index.gather(-1, ranks[1].take(position))
    return scores, torch.add(column, row, alpha=num_subkeys).to(torch.int32)


def _scores(halves: Tensor, keys: Tensor) -> Tensor:
    """[2 H, t, N] of halves [2 H, t, D] and keys [2 H, D, N], which lie as [2 H, N, D]."""
    if halves.is_cpu and halves.shape[1] <= FEW_TOKENS:
        # As the keys lie in memory: from there, not from a cache, it is up to twice as fast.
        return matmul_full_float32(keys.transpose(1, 2), halves.transpose(1, 2)).transpose(1, 2)
    return matmul_full_float32(halves, keys)


def _best_sums(sums: Tensor, leaders: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of sums [t, H, C], and where; leaders [t, H, 2] are the best of each half.

    A sum is NaN where a half's best is, or +inf meets -inf, and torch.topk puts NaN first: on a CPU
    the result tells whether there is one. On a GPU to ask would wait for the device.
    """
    if sums.is_cpu:
        scores, position = sums.topk(top_k)
        if not math.isnan(scores.sum().item()):
            return scores, position
    sums.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    scores, position = sums.topk(top_k)
    return scores.masked_fill_(leaders.isnan().any(-1, keepdim=True), torch.nan), position


def product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, subkeys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `product_key_topk`'s scores.

    With S the sparse [T, N] matrix of a head and half (the scores' gradient at the sub-keys
    chosen), the query's gradient is S · C and the codebook's is Sᵀ · Q.

    Args:
        grad_scores: [T, H, k].
        query: [T, H, d_q].
        subkeys: [H, 2, N, d_q / 2].
        slots: [T, H, k], as returned.

    Returns:
        grad_query and grad_subkeys, of the shapes and dtypes of query and subkeys.
    """
    num_tokens, heads, query_dim = query.shape
    num_subkeys = subkeys.shape[2]
    dtype = scoring_dtype(query, subkeys)
    keys = subkeys.to(dtype)
    grad_query = torch.empty_like(query)
    grad_keys = torch.zeros_like(keys)
    for chunk in token_chunks(num_tokens, heads * 2 * num_subkeys):
        halves = query[chunk].to(dtype).view(-1, heads, 2, query_dim // 2).permute(1, 2, 0, 3)
        slot = slots[chunk].transpose(0, 1).to(torch.int64)
        chosen = torch.stack([slot // num_subkeys, slot % num_subkeys], dim=1)  # [H, 2, t, k]
        grad = grad_scores[chunk].to(dtype).transpose(0, 1).unsqueeze(1).expand_as(chosen)
        sparse = grad.new_zeros(*chosen.shape[:-1], num_subkeys).scatter_add_(-1, chosen, grad)
        grad_query[chunk] = (sparse @ keys).permute(2, 0, 1, 3).flatten(2)
        grad_keys += sparse.transpose(-1, -2) @ halves
    return grad_query, grad_keys.to(subkeys.dtype)
