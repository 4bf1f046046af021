"""Gradients of the product-key top-k: products with sparse tiles, made where they are used.

With S the sparse [T, N] matrix of a head and half (the scores' gradient at the sub-keys chosen),
the query's gradient is S · C and the codebook's is Sᵀ · Q.

Shapes: T tokens, H heads, N sub-keys a codebook, k reads a head, D = d_q / 2.
    grad_scores, slots [T, H, k]; query, grad_query [T, H, 2 D]; subkeys, grad_subkeys [H, 2, N, D]

A token's reads often share a sub-key, so a first kernel gives each read the sum of what its token
adds to its sub-key. Then reads that share one would store the same in S, and a program makes a tile
of S by plain stores, in memory of its own that stays in cache; it clears it in the same way. The
tile is the left operand of a matrix product like any other.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import float32_precision, load_stages

# Programs of a product: about one a multiprocessor of an H100.
PROGRAMS = 128
# Bytes of the tile of S of a program.
TILE_BYTES = 1 << 17


@triton.jit
def subkey_of(slot, half, N: tl.constexpr):
    """The sub-key of a slot in one half, -1 for a slot that is none."""
    subkey = tl.where(half == 0, slot // N, slot % N)
    return tl.where((slot >= 0) & (slot < N * N), subkey, -1)


@triton.jit(do_not_specialize=["num_queries"])
def merge_repeats_kernel(
    grad_scores_ptr,  # [T · H, k]
    slots_ptr,  # [T · H, k]
    merged_ptr,  # [2, T · H, k], float32
    num_queries,
    K: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """A program owns one half of ROWS queries."""
    query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
    half = tl.program_id(1)
    inside = query < num_queries
    for first in tl.range(0, K, BLOCK_K, num_stages=1):
        read = first + tl.arange(0, BLOCK_K)[None, :, None]
        mask = inside & (read < K)
        subkey = subkey_of(tl.load(slots_ptr + query * K + read, mask=mask, other=-1), half, N)
        total = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for first_other in tl.range(0, K, BLOCK_OTHER, num_stages=1):
            other = first_other + tl.arange(0, BLOCK_OTHER)[None, None, :]
            other_mask = inside & (other < K)
            place = query * K + other
            slot = tl.load(slots_ptr + place, mask=other_mask, other=-1)
            grad = tl.load(grad_scores_ptr + place, mask=other_mask, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(subkey_of(slot, half, N) == subkey, grad, 0.0), 2)
        place = (half.to(tl.int64) * num_queries + query) * K + read
        tl.store(merged_ptr + place, total[:, :, None], mask=mask)


@triton.jit
def store_tile(
    tile_ptr, merged_ptr, slots_ptr, token, end, head, half, first, num_queries, STRIDE_T,
    STRIDE_N, H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, CLEAR: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Store S, or zeros, at the reads of tokens token .. end and WIDTH sub-keys from first on."""
    BLOCK_T: tl.constexpr = min(TOKENS, 4096 // BLOCK_K)
    for first_row in tl.range(0, TOKENS, BLOCK_T, num_stages=1):
        for first_read in tl.range(0, K, BLOCK_K, num_stages=1):
            row = first_row + tl.arange(0, BLOCK_T)[:, None]
            read = first_read + tl.arange(0, BLOCK_K)[None, :]
            place = ((token + row) * H + head) * K + read
            mask = (token + row < end) & (read < K)
            local = subkey_of(tl.load(slots_ptr + place, mask=mask, other=-1), half, N) - first
            wanted = mask & (local >= 0) & (local < WIDTH) & (local < N - first)
            target = tile_ptr + row * STRIDE_T + local * STRIDE_N
            if CLEAR:
                grad = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
            else:
                half_ptr = merged_ptr + tl.cast(half, tl.int64) * num_queries * K
                grad = tl.load(half_ptr + place, mask=wanted, other=0.0)
                if ROUND:
                    # To the 10 bits of tf32, which a product would otherwise cut off.
                    bits = grad.to(tl.int32, bitcast=True)
                    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
                    grad = tl.where(grad == grad, bits.to(tl.float32, bitcast=True), grad)
            tl.store(target, grad.to(tile_ptr.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["num_tokens"])
def grad_query_kernel(
    merged_ptr,  # [2, T · H, k]
    slots_ptr,  # [T, H, k]
    subkeys_ptr,  # [H, 2, N, D]
    tile_ptr,  # [programs, BLOCK_T, WIDTH], zeros
    grad_query_ptr,  # [T, H, 2 D]
    num_tokens,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_T tokens of one head and half at a time, and a tile of S."""
    tile_ptr += tl.program_id(0).to(tl.int64) * (BLOCK_T * WIDTH)
    row = tl.arange(0, BLOCK_T)[:, None]
    num_queries = tl.cast(num_tokens, tl.int64) * H
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks = tl.cdiv(num_tokens, BLOCK_T) * (2 * H * D_BLOCKS)
    for block in tl.range(
        tl.program_id(0), blocks, tl.num_programs(0), num_stages=1, disable_licm=True
    ):
        column = block % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        half = block // D_BLOCKS % 2
        head = block // (2 * D_BLOCKS) % H
        token = tl.cast(block // (2 * H * D_BLOCKS), tl.int64) * BLOCK_T
        store_tile(
            tile_ptr, merged_ptr, slots_ptr, token, num_tokens, head, half, 0, num_queries, WIDTH,
            1, H, K, N, WIDTH, BLOCK_T, BLOCK_K, False, PRECISION == "tf32",
        )  # fmt: skip
        tl.debug_barrier()
        keys_ptr = subkeys_ptr + tl.cast(head * 2 + half, tl.int64) * (N * D)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            n = first + tl.arange(0, BLOCK_N)
            tile = tl.load(tile_ptr + row * WIDTH + n[None, :])
            mask = (n[:, None] < N) & (column < D)
            keys = tl.load(keys_ptr + n[:, None] * D + column, mask=mask, other=0.0)
            if UPCAST:
                keys = keys.to(tl.float32)
            total = tl.dot(tile, keys, total, input_precision=PRECISION)
        place = (((token + row) * H + head) * 2 + half) * D + column
        mask = (token + row < num_tokens) & (column < D)
        tl.store(grad_query_ptr + place, total.to(grad_query_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
        store_tile(
            tile_ptr, merged_ptr, slots_ptr, token, num_tokens, head, half, 0, num_queries, WIDTH,
            1, H, K, N, WIDTH, BLOCK_T, BLOCK_K, True, False,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_tokens", "stretch"])
def grad_subkeys_kernel(
    merged_ptr,  # [2, T · H, k]
    slots_ptr,  # [T, H, k]
    query_ptr,  # [T, H, 2 D]
    tile_ptr,  # [programs, BLOCK_N, TOKENS], zeros
    parts_ptr,  # [stretches, H, 2, N, D]
    num_tokens, stretch,
    H: tl.constexpr, K: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns a [BLOCK_N, BLOCK_D] block of a codebook, for a stretch of the tokens."""
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    tile_ptr += program.to(tl.int64) * (BLOCK_N * TOKENS)
    column = program % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first = program // D_BLOCKS % N_BLOCKS * BLOCK_N
    book = program // (D_BLOCKS * N_BLOCKS) % (2 * H)
    part = program // (D_BLOCKS * N_BLOCKS * 2 * H)
    head = book // 2
    half = book % 2
    n = tl.arange(0, BLOCK_N)[:, None]
    num_queries = tl.cast(num_tokens, tl.int64) * H
    start = part.to(tl.int64) * stretch
    stop = tl.minimum(start + stretch, num_tokens)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for token in tl.range(start, stop, TOKENS, num_stages=1, disable_licm=True):
        store_tile(
            tile_ptr, merged_ptr, slots_ptr, token, stop, head, half, first, num_queries, 1,
            TOKENS, H, K, N, BLOCK_N, TOKENS, BLOCK_K, False, PRECISION == "tf32",
        )  # fmt: skip
        tl.debug_barrier()
        for first_row in tl.range(0, TOKENS, BLOCK_T, num_stages=STAGES):
            row = first_row + tl.arange(0, BLOCK_T)
            tile = tl.load(tile_ptr + n * TOKENS + row[None, :])
            place = (((token + row)[:, None] * H + head) * 2 + half) * D + column
            mask = (token + row < stop)[:, None] & (column < D)
            query = tl.load(query_ptr + place, mask=mask, other=0.0)
            if UPCAST:
                query = query.to(tl.float32)
            total = tl.dot(tile, query, total, input_precision=PRECISION)
        tl.debug_barrier()
        store_tile(
            tile_ptr, merged_ptr, slots_ptr, token, stop, head, half, first, num_queries, 1,
            TOKENS, H, K, N, BLOCK_N, TOKENS, BLOCK_K, True, False,
        )  # fmt: skip
        tl.debug_barrier()
    place = ((part.to(tl.int64) * (2 * H) + book) * N + first + n) * D + column
    mask = (first + n < N) & (column < D)
    tl.store(parts_ptr + place, total.to(parts_ptr.dtype.element_ty), mask=mask)


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
    block_k = max(16, min(triton.next_power_of_2(reads), 64))
    merged = query.new_empty(2, num_tokens * heads, reads, dtype=torch.float32)
    rows = max(1, 1024 // block_k**2 * 16)
    merge_repeats_kernel[(triton.cdiv(num_tokens * heads, rows), 2)](
        grad_scores, slots, merged, num_tokens * heads,
        K=reads, N=num_subkeys, ROWS=rows, BLOCK_K=block_k, BLOCK_OTHER=block_k,
        num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    small = upcast or num_tokens < 64
    block_d = max(16, min(triton.next_power_of_2(dim), 64 if upcast else 256))
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    constants = {
        "H": heads, "K": reads, "N": num_subkeys, "D": dim, "BLOCK_D": block_d,
        "BLOCK_K": block_k, "STAGES": 1 if upcast else load_stages(query.device), "UPCAST": upcast,
        "PRECISION": precision,
    }  # fmt: skip
    grad_query = query.new_empty(query.shape)
    block_n = 32 if upcast else 64
    width = triton.cdiv(num_subkeys, block_n) * block_n
    block_t = TILE_BYTES // (width * dtype.itemsize)
    block_t = max(16, min(1 << block_t.bit_length() - 1 if block_t else 1, 32 if small else 128))
    blocks = triton.cdiv(num_tokens, block_t) * 2 * heads * triton.cdiv(dim, block_d)
    programs = min(blocks, PROGRAMS)
    tiles = query.new_zeros(programs, block_t, width, dtype=dtype)
    grad_query_kernel[(programs,)](
        merged, slots, subkeys, tiles, grad_query, num_tokens,
        WIDTH=width, BLOCK_T=block_t, BLOCK_N=block_n, **constants, **options,
    )  # fmt: skip
    block_n = min(max(16, triton.next_power_of_2(num_subkeys)), 64 if upcast else 128)
    tokens = 64 if small else 512
    owners = 2 * heads * triton.cdiv(num_subkeys, block_n) * triton.cdiv(dim, block_d)
    parts = max(1, min(PROGRAMS // owners, triton.cdiv(num_tokens, tokens)))
    stretch = triton.cdiv(num_tokens, parts)
    tiles = query.new_zeros(owners * parts, block_n, tokens, dtype=dtype)
    grad_subkeys = subkeys.new_empty(subkeys.shape)
    sums = grad_subkeys
    if parts > 1:
        sums = query.new_empty(parts, *subkeys.shape, dtype=torch.float32)
    grad_subkeys_kernel[(owners * parts,)](
        merged, slots, query, tiles, sums, num_tokens, stretch,
        TOKENS=tokens, BLOCK_N=block_n, BLOCK_T=32 if upcast else 64, **constants, **options,
    )  # fmt: skip
    if parts > 1:
        sum_stretches_kernel[(triton.cdiv(subkeys.numel(), 1024),)](
            sums, grad_subkeys, subkeys.numel(), parts, BLOCK=1024, num_warps=4, num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
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
        "product backward many float32": call(16384, 512, torch.float32),
        "product backward few 512": call(1, 512, torch.bfloat16),
    }
