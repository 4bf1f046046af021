"""Product-key top-k: the k best of N² slots from two codebooks of N sub-keys (paper 3.1).

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    query, grad_query [T, H, 2 D]; subkeys, grad_subkeys [H, 2, N, D]; slot = i · N + j
    scores, slots, grad_scores [T, H, k]
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .chip import float32_precision, load_stages
from .combine.kernels import combine_kernel
from .combine.plan import MOST_SORTED, choose_combine_shape, options, programs, rank_pairs
from .reads.blocks import choose_blocks
from .reads.products import grad_query_kernel, grad_subkeys_kernel, sum_stretches_kernel
from .reads.sparse_tiles import compress_reads_kernel
from .select.plan import plan_selection, select
from .select.traffic import select_bytes

# Programs of the codebooks' gradient: about one a multiprocessor of an H100.
PROGRAMS = 128
# Bytes of the lists of reads, which are to stay in cache: of more tokens than fit, some at a time.
LIST_BYTES = 1 << 26


def product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` slots of highest score, exactly (paper equation 4 and the text below it).

    Args:
        query: [T, H, d_q].
        subkeys: [H, 2, N, d_q / 2].
        top_k: 1 <= top_k <= N².

    Returns:
        scores [T, H, top_k], descending, float32, and slots [T, H, top_k], int32. A NaN among a
        query's sub-key scores makes all its scores NaN. The sum of +inf and -inf is -inf.
    """
    num_tokens, heads, _ = query.shape
    num_subkeys, half_dim = subkeys.shape[2:]
    scores = query.new_empty(num_tokens, heads, top_k, dtype=torch.float32)
    slots = query.new_empty(num_tokens, heads, top_k, dtype=torch.int32)
    if num_tokens == 0:
        return scores, slots
    # To what selects each half is a head.
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    per_half = min(top_k, num_subkeys)
    # In turns the sorted halves cannot take the place of candidates, which are read again.
    spare = per_half if top_k > MOST_SORTED else 0
    plan = plan_selection(halves, books, per_half, spare)
    shape = choose_combine_shape(plan, top_k)
    pairs = rank_pairs(top_k, num_subkeys, query.device)
    lists, counts = plan.buffers(halves)
    for first in plan.turns(num_tokens):
        turn = slice(first, first + plan.tokens)
        select(halves[turn], books, per_half, plan, lists, counts)
        tokens = scores[turn].shape[0]
        combine_kernel[programs(tokens, heads, shape)](
            list_ptr=lists,
            count_ptr=counts,
            pairs_ptr=pairs,
            scores_ptr=scores[turn],
            slots_ptr=slots[turn],
            num_tokens=tokens,
            num_subkeys=num_subkeys,
            top_k=top_k,
            num_pairs=pairs.numel(),
            splits=plan.splits,
            slots=plan.slots,
            sorted_at=plan.capacity if spare else 0,
            C=shape,
            **options(shape, 2, query.device),
        )
    return scores, slots


def product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, subkeys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `product_key_topk`'s scores. No [T, H, 2, N] is formed.

    Args:
        grad_scores: [T, H, k].
        query: [T, H, d_q].
        subkeys: [H, 2, N, d_q / 2].
        slots: [T, H, k], as returned.

    Returns:
        grad_query and grad_subkeys, of the shapes and dtypes of query and subkeys.
    """
    num_tokens, heads, _ = query.shape
    num_subkeys, dim = subkeys.shape[2:]
    reads = slots.shape[2]
    dtypes = {query.dtype, subkeys.dtype}
    # bfloat16 goes into the products as it is; tf32 holds all of float16; float32 is kept whole.
    upcast = triton.knobs.runtime.interpret or dtypes != {torch.bfloat16}
    precision = float32_precision(query.device)
    if precision == "tf32x3" and torch.float32 not in dtypes:
        precision = "tf32"
    if not upcast:
        precision = "ieee"
    dtype = torch.float32 if upcast else torch.bfloat16
    stages = load_stages(query.device)
    of_query, of_subkeys = choose_blocks(query, upcast)
    by_query = of_query.constants(dim, num_subkeys)
    by_subkeys = of_subkeys.constants(dim, num_subkeys)
    groups, words = triton.cdiv(reads, 32), triton.cdiv(num_subkeys, 16)
    constants = {
        "H": heads, "N": num_subkeys, "D": dim, "GROUPS": groups, "WORDS": words,
        "UPCAST": upcast, "PRECISION": precision,
    }  # fmt: skip
    options = {"num_stages": 1, "enable_fp_fusion": True}
    # Tokens at a time, and programs that share them for a block of a codebook.
    a_token = 2 * heads * groups * (32 * dtype.itemsize + words * 4)
    chunks = max(1, triton.cdiv(num_tokens * a_token, LIST_BYTES))
    chunk = triton.cdiv(triton.cdiv(num_tokens, chunks), 128) * 128
    chunk = max(1, min(chunk, num_tokens))
    owners = 2 * heads * triton.cdiv(num_subkeys, by_subkeys["BLOCK_N"])
    owners *= triton.cdiv(dim, by_subkeys["BLOCK_D"])
    parts = max(1, min(PROGRAMS // owners, triton.cdiv(chunk, of_subkeys.tokens)))
    values = query.new_empty(2 * chunk * heads * groups * 32, dtype=dtype)
    marks = query.new_empty(2 * chunk * heads * groups * words, dtype=torch.int32)
    grad_query = query.new_empty(query.shape)
    grad_subkeys = subkeys.new_empty(subkeys.shape)
    alone = parts == 1 and chunk >= num_tokens
    sums = grad_subkeys
    if not alone:
        sums = query.new_empty(parts, *subkeys.shape, dtype=torch.float32)
    rows = 128 if stages > 1 else 64
    for first in range(0, max(1, num_tokens), chunk):
        some = slice(first, first + chunk)
        count = min(chunk, num_tokens - first)
        compress_reads_kernel[(triton.cdiv(count * heads, rows), 2, groups)](
            grad_scores[some], slots[some], values, marks, count * heads,
            K=reads, N=num_subkeys, GROUPS=groups, WORDS=words, ROWS=rows,
            BLOCK_W=min(64, triton.next_power_of_2(words)), EACH=4, ROUND=precision == "tf32",
            num_warps=4, **options,
        )  # fmt: skip
        blocks = triton.cdiv(count, by_query["BLOCK_T"]) * triton.cdiv(dim, by_query["BLOCK_D"])
        grad_query_kernel[(2 * heads * blocks,)](
            values, marks, subkeys, grad_query[some], count,
            SWAPPED=of_query.swapped, **constants, **by_query, **options,
        )  # fmt: skip
        grad_subkeys_kernel[(owners * parts,)](
            values, marks, query[some], sums, count, triton.cdiv(count, parts),
            ADD=first > 0, **constants, **by_subkeys, **options,
        )  # fmt: skip
    if not alone:
        sum_stretches_kernel[(triton.cdiv(subkeys.numel(), 1024),)](
            sums, grad_subkeys, subkeys.numel(), parts, BLOCK=1024, num_warps=4, **options
        )
    return grad_query, grad_subkeys


def product_key_topk_bytes(query: Tensor, subkeys: Tensor, top_k: int) -> dict[str, int]:
    """What `product_key_topk` reads and writes of each tensor; of the lists the least."""
    num_tokens, heads, _ = query.shape
    num_subkeys, half_dim = subkeys.shape[2:]
    halves = query.view(num_tokens, 2 * heads, half_dim)
    books = subkeys.view(2 * heads, num_subkeys, half_dim)
    per_half = min(top_k, num_subkeys)
    moved = select_bytes(halves, books, per_half, plan_selection(halves, books, per_half))
    result = 4 * num_tokens * heads * top_k
    return moved | {"scores": result, "slots": result}


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        num_tokens: int, num_subkeys: int, top_k: int, dtype: torch.dtype
    ) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        subkeys = torch.empty(4, 2, num_subkeys, 256, dtype=dtype, device="meta")
        return lambda: product_key_topk(query, subkeys, top_k)

    def call_backward(
        num_tokens: int, num_subkeys: int, dtype: torch.dtype
    ) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        subkeys = torch.empty(4, 2, num_subkeys, 256, dtype=dtype, device="meta")
        grad_scores = torch.empty(num_tokens, 4, 32, device="meta")
        slots = torch.empty(num_tokens, 4, 32, dtype=torch.int32, device="meta")
        return lambda: product_key_topk_backward(grad_scores, query, subkeys, slots)

    return {
        "product many of 32": call(16384, 1024, 32, torch.bfloat16),
        "product many of 64": call(16384, 1024, 64, torch.bfloat16),
        "product many float32": call(16384, 1024, 32, torch.float32),
        "product some of 32": call(1024, 1024, 32, torch.bfloat16),
        "product few of 32": call(1, 1024, 32, torch.bfloat16),
        "product few of 256": call(1, 1024, 256, torch.bfloat16),
        "product few float32": call(1, 1024, 32, torch.float32),
        "product backward many 512": call_backward(16384, 512, torch.bfloat16),
        "product backward many 4096": call_backward(16384, 4096, torch.bfloat16),
        "product backward many float16": call_backward(16384, 512, torch.float16),
        "product backward many float32": call_backward(16384, 512, torch.float32),
        "product backward few 512": call_backward(1, 512, torch.bfloat16),
    }
