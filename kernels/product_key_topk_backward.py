"""Gradients of the product-key top-k: products with sparse tiles, made where they are used.

With S the sparse [T, N] matrix of a head and half (the scores' gradient at the sub-keys chosen),
the query's gradient is S · C and the codebook's is Sᵀ · Q, both on tensor cores. A tile of S is
made in registers, from lists of what a token read (`sparse_tiles`), and never in memory.

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    grad_scores, slots [T, H, k]; query, grad_query [T, H, 2 D]; subkeys, grad_subkeys [H, 2, N, D]
    values [2, T · H, GROUPS, 32]; words [2, T · H, GROUPS, WORDS]: the lists of 32 reads each
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chip import float32_precision, load_stages
from .launch_backward import choose_blocks
from .sparse_tiles import compress_reads_kernel, make_tile, tile_columns

# Programs of the codebooks' product: about one a multiprocessor of an H100.
PROGRAMS = 128
# Bytes of the lists, which are to stay in cache: of more tokens than fit, some at a time.
LIST_BYTES = 1 << 26


@triton.jit(do_not_specialize=["num_tokens"])
def grad_query_kernel(
    values_ptr,
    words_ptr,
    subkeys_ptr,
    grad_query_ptr,
    num_tokens,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_D columns of BLOCK_T tokens of one head and half."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0)
    column = block % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    half = block // D_BLOCKS % 2
    head = block // (2 * D_BLOCKS) % H
    token = tl.cast(block // (2 * H * D_BLOCKS), tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[:, None]
    inside = row < num_tokens - token
    line = ((tl.cast(half, tl.int64) * num_tokens + token) * H + head) * GROUPS
    values_ptr += line * 32
    words_ptr += line * WORDS
    keys_ptr = subkeys_ptr + tl.cast(head * 2 + half, tl.int64) * (N * D)
    n = tile_columns(BLOCK_N)[:, None]
    total = tl.zeros([BLOCK_D, BLOCK_T] if SWAPPED else [BLOCK_T, BLOCK_D], tl.float32)
    for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        tile = make_tile(
            values_ptr, words_ptr, row * (H * GROUPS), inside, first, GROUPS, WORDS, BLOCK_N,
            PRECISION == "tf32",
        )  # fmt: skip
        mask = (n < N - first) & (column < D)
        keys = tl.load(keys_ptr + first * D + (n * D + column), mask=mask, other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
        if SWAPPED:
            # Then no operand is in registers, which the sums need.
            total = tl.dot(tl.trans(keys), tl.trans(tile), total, input_precision=PRECISION)
        else:
            total = tl.dot(tile, keys, total, input_precision=PRECISION)
    grad_query_ptr += ((token * H + head) * 2 + half) * D
    if SWAPPED:
        total = tl.trans(total)
    total = total.to(grad_query_ptr.dtype.element_ty)
    tl.store(grad_query_ptr + row * (2 * H * D) + column, total, mask=inside & (column < D))


@triton.jit(do_not_specialize=["num_tokens", "stretch"])
def grad_subkeys_kernel(
    values_ptr,
    words_ptr,
    query_ptr,
    parts_ptr,  # [stretches, H, 2, N, D]
    num_tokens, stretch,
    H: tl.constexpr, N: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A program owns a [BLOCK_N, BLOCK_D] block of a codebook, for a stretch of the tokens.

    It stores what they add to it, or if ADD adds that to what is stored.
    """
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    column = program % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first = program // D_BLOCKS % N_BLOCKS * BLOCK_N
    book = program // (D_BLOCKS * N_BLOCKS) % (2 * H)
    part = program // (D_BLOCKS * N_BLOCKS * 2 * H)
    head = book // 2
    half = book % 2
    start = part.to(tl.int64) * stretch
    stop = tl.minimum(start + stretch, num_tokens)
    row = tl.arange(0, BLOCK_T)[:, None]
    n = first + tile_columns(BLOCK_N)[:, None]
    parts_ptr += (part.to(tl.int64) * (2 * H) + book) * (N * D)
    mask = (n < N) & (column < D)
    if ADD:
        total = tl.load(parts_ptr + (n * D + column), mask=mask, other=0.0)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for token in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        inside = row < stop - token
        line = ((tl.cast(half, tl.int64) * num_tokens + token) * H + head) * GROUPS
        tile = make_tile(
            values_ptr + line * 32, words_ptr + line * WORDS, row * (H * GROUPS), inside, first,
            GROUPS, WORDS, BLOCK_N, PRECISION == "tf32",
        )  # fmt: skip
        tokens_ptr = query_ptr + ((token * H + head) * 2 + half) * D
        place = row * (2 * H * D) + column
        query = tl.load(tokens_ptr + place, mask=inside & (column < D), other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        total = tl.dot(tl.trans(tile), query, total, input_precision=PRECISION)
    total = total.to(parts_ptr.dtype.element_ty)
    tl.store(parts_ptr + (n * D + column), total, mask=mask)


@triton.jit
def sum_stretches_kernel(
    parts_ptr,  # [stretches, elements]
    grad_subkeys_ptr,  # [elements]
    num_elements, num_parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK elements of the codebooks."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(num_parts):
        place = tl.cast(part, tl.int64) * num_elements + element
        total += tl.load(parts_ptr + place, mask=element < num_elements, other=0.0)
    total = total.to(grad_subkeys_ptr.dtype.element_ty)
    tl.store(grad_subkeys_ptr + element, total, mask=element < num_elements)


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
    by_query = of_query.constants(dim, num_subkeys, stages)
    by_subkeys = of_subkeys.constants(dim, num_subkeys, stages)
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


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(num_tokens: int, num_subkeys: int, dtype: torch.dtype) -> Callable[[], object]:
        query = torch.empty(num_tokens, 4, 512, dtype=dtype, device="meta")
        subkeys = torch.empty(4, 2, num_subkeys, 256, dtype=dtype, device="meta")
        grad_scores = torch.empty(num_tokens, 4, 32, device="meta")
        slots = torch.empty(num_tokens, 4, 32, dtype=torch.int32, device="meta")
        return lambda: product_key_topk_backward(grad_scores, query, subkeys, slots)

    return {
        "product backward many 512": call(16384, 512, torch.bfloat16),
        "product backward many 4096": call(16384, 4096, torch.bfloat16),
        "product backward many float16": call(16384, 512, torch.float16),
        "product backward many float32": call(16384, 512, torch.float32),
        "product backward few 512": call(1, 512, torch.bfloat16),
    }
