"""Gradients of the product-key top-k: products with sparse tiles, made where they are used.

With S the sparse [T, N] matrix of a head and half (the scores' gradient at the sub-keys chosen),
the query's gradient is S · C and the codebook's is Sᵀ · Q, both on tensor cores. A tile of S is
made in registers, from lists of what a token read (`sparse_tiles`), and never in memory.

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    grad_scores, slots [T, H, k]; query, grad_query [T, H, 2 D]; subkeys, grad_subkeys [H, 2, N, D]
    values [2, T · H, GROUPS, 32]; words [2, T · H, GROUPS, WORDS]: the lists of 32 reads each
"""

import triton
import triton.language as tl

from .sparse_tiles import make_tile, tile_columns


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
