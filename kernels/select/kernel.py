"""The kernel that selects each row's candidates."""

import triton
import triton.language as tl

from .candidates import append, make_room
from .entries import from_order_bits, order_bits, pack
from .layout import fragment_columns, fragment_rows, row_max
from .scoring import load_query, score_tile
from .threshold import raise_threshold

# Twice the factor by which the keys seen grow from one threshold to the next.
GROWTH = tl.constexpr(4)


@triton.jit
def limit_of(threshold, reached, top_k):
    """What a score must reach, [2, 1, THREADS]: once top_k reach the threshold, what is above."""
    above = from_order_bits(order_bits(threshold) + 1)
    return tl.where(reached >= top_k, above, threshold)[:, None, :]


@triton.jit
def maximum_or_nan(a, b):
    """The larger of two, or NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["num_tokens", "num_keys", "span", "top_k", "capacity", "slots"])
def select_kernel(
    query_ptr,  # [T, H, D]
    keys_ptr,  # [H, N, D]
    list_ptr,  # [blocks, H, splits, slots, ROWS], entries
    count_ptr,  # [blocks, H, splits, ROWS]
    num_tokens,
    num_keys,
    span,
    top_k,
    capacity,
    slots,
    S: tl.constexpr,
):
    """A program owns ROWS tokens of one head, a span of its keys, and the lists of both."""
    ROWS: tl.constexpr = S.rows
    TILE: tl.constexpr = S.tile
    LOOK: tl.constexpr = S.look
    STAGES: tl.constexpr = S.stages if S.dim <= S.block_d else 1
    THREADS: tl.constexpr = 32 * S.warps
    blocks = tl.cdiv(num_tokens, ROWS)
    splits = tl.cdiv(num_keys, span)
    heads = tl.num_programs(0) // (blocks * splits)
    # Neighbours share a head's keys.
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    head = tl.program_id(0) // (blocks * splits)
    lists = (block * heads + head).to(tl.int64) * splits + split
    list_ptr += lists * slots * ROWS
    keys_ptr += tl.cast(head, tl.int64) * num_keys * S.dim
    first = split * span
    end = tl.minimum(first + span, num_keys)
    # The last token again in place of those past it.
    token = tl.minimum(block * ROWS + tl.arange(0, ROWS), num_tokens - 1)
    row = (token.to(tl.int64) * heads + head)[:, None]
    query = load_query(query_ptr, row, S)

    # A first look at tiles spread over all keys, whatever order their scores have.
    maxima = tl.full([2, TILE * ROWS // (2 * THREADS), THREADS], float("-inf"), tl.float32)
    threshold = tl.full([2, THREADS], float("-inf"), tl.float32)
    whole = (end - first) // TILE * TILE
    # Fewer keys are all candidates.
    looks = (LOOK > 0) & (whole > 2 * top_k)
    raise_at = tl.where(looks, first + LOOK * TILE * GROWTH // 2, end)
    if looks:
        stride = tl.cdiv(whole, LOOK * TILE) * TILE
        for start in tl.range(first, first + whole, stride, num_stages=STAGES, disable_licm=True):
            score = score_tile(query, query_ptr, keys_ptr, start, end, S)
            maxima = maximum_or_nan(maxima, score)
        threshold = raise_threshold(threshold, maxima, top_k, ROWS)

    count = tl.zeros([2, THREADS], tl.int32)
    before = count
    longest = 0
    start = first
    while start < end:
        # As far as no list can overflow; of the last keys only what there is.
        tiles = tl.cdiv(tl.minimum(end, raise_at) - start, TILE)
        stop = start + tl.minimum(tiles, (capacity - longest) // TILE) * TILE
        full_stop = tl.minimum(stop, first + whole)
        for at in tl.range(start, full_stop, TILE, num_stages=STAGES, disable_licm=True):
            score = score_tile(query, query_ptr, keys_ptr, at, end, S)
            maxima = maximum_or_nan(maxima, score)
            key = fragment_columns(at, ROWS, TILE, THREADS)
            keep = score >= limit_of(threshold, count - before, top_k)
            count = append(list_ptr, score, key, keep, count, S)
        for at in tl.range(full_stop, stop, TILE, num_stages=STAGES, disable_licm=True):
            score = score_tile(query, query_ptr, keys_ptr, at, end, S)
            maxima = maximum_or_nan(maxima, score)
            key = fragment_columns(at, ROWS, TILE, THREADS)
            keep = (score >= limit_of(threshold, count - before, top_k)) & (key < end)
            count = append(list_ptr, score, key, keep, count, S)
        start = stop
        longest = tl.max(count)
        full = (longest > capacity - TILE) & (start < end)
        # The candidates found early reach only an old threshold.
        last = looks & (start >= end) & (end - first > LOOK * TILE)
        if looks & (full | last | (start >= raise_at)):
            raise_at = tl.maximum(raise_at, first + (start - first) * GROWTH // 2)
            raised = raise_threshold(threshold, maxima, top_k, ROWS)
            before = tl.where(raised > threshold, count, before)
            threshold = raised
        if full | last:
            count, threshold = make_room(list_ptr, count, threshold, top_k, capacity, S)
            before = tl.zeros([2, THREADS], tl.int32)
            longest = tl.max(count)

    # NaN, the best of all, stands for all candidates of a row that has one.
    place = fragment_rows(ROWS, THREADS)
    spoilt = row_max(tl.max((maxima != maxima).to(tl.float32), 1), ROWS)[:, None, :] > 0
    tl.debug_barrier()
    nan = tl.full([2, 1, THREADS], float("nan"), tl.float32)
    tl.store(list_ptr + place, pack(nan, tl.zeros([2, 1, THREADS], tl.int32)), mask=spoilt)
    tl.store(count_ptr + lists * ROWS + place, tl.where(spoilt, 1, count[:, None, :]))
