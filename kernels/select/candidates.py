"""The candidates of each row, in memory: [capacity, ROWS] entries, score bits above the key."""

import triton
import triton.language as tl

from .entries import entry_score, key_score, order_bits, pack, sort_key
from .layout import fragment_columns, fragment_rows, row_prefix, row_sum


@triton.jit
def append(list_ptr, score, key, keep, count, S: tl.constexpr):
    """Append the scores and keys [2, C, THREADS] to keep, and return the new lengths."""
    ROWS: tl.constexpr = S.rows
    # Counted in float32, for which a comparison gives its 0.0 or 1.0 in one instruction.
    one = tl.where(keep, 1.0, 0.0)
    own = tl.sum(one, 1).to(tl.int32)
    before, total = row_prefix(own, ROWS)
    at = (count + before - 1)[:, None, :] + tl.cumsum(one, 1).to(tl.int32)
    row = fragment_rows(ROWS, 32 * S.warps)
    tl.store((list_ptr + row) + at.to(tl.int64) * ROWS, pack(score, key), mask=keep)
    return count + total


@triton.jit
def load_candidates(list_ptr, start, count, S: tl.constexpr):
    """The candidates from start on in fragments: scores, keys, and which there are."""
    ROWS: tl.constexpr = S.rows
    THREADS: tl.constexpr = 32 * S.warps
    at = fragment_columns(start, ROWS, S.read, THREADS)
    valid = at < count[:, None, :]
    place = (list_ptr + fragment_rows(ROWS, THREADS)) + at.to(tl.int64) * ROWS
    entry = tl.load(place, mask=valid, other=0)
    return entry_score(entry), entry.to(tl.int32), valid


@triton.jit
def prune(list_ptr, least, count, S: tl.constexpr):
    """Keep the candidates whose sort key is at least that [2, THREADS]; the new lengths."""
    kept = tl.zeros(count.shape, tl.int32)
    tl.debug_barrier()
    for start in tl.range(0, tl.max(count), S.read, num_stages=1, disable_licm=True):
        score, key, valid = load_candidates(list_ptr, start, count, S)
        tl.debug_barrier()
        keep = valid & (sort_key(score, key) >= least[:, None, :])
        kept = append(list_ptr, score, key, keep, kept, S)
    tl.debug_barrier()
    return kept


@triton.jit
def kth_sort_key(list_ptr, count, top_k, S: tl.constexpr):
    """The sort key of each row's k-th best candidate, or of one that as many reach.

    By bisection, which ends where as many as are wanted reach the middle in all rows.
    """
    low = tl.full(count.shape, -0x7FFFFFFFFFFFFFFF, tl.int64)
    high = tl.where(count > top_k, 0x7FFFFFFFFFFFFFFF, low)
    open_rows = tl.max(count) > top_k
    while open_rows:
        # The mean, without overflow; above low.
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)
        reach = tl.zeros(count.shape, tl.int32)
        for start in tl.range(0, tl.max(count), S.read, num_stages=1, disable_licm=True):
            score, key, valid = load_candidates(list_ptr, start, count, S)
            reach += tl.sum((valid & (sort_key(score, key) >= middle[:, None, :])).to(tl.int32), 1)
        reach = row_sum(reach, S.rows)
        low = tl.where(reach >= top_k, middle, low)
        high = tl.where(reach > top_k, high, tl.where(reach == top_k, middle, middle - 1))
        open_rows = tl.max((low < high).to(tl.int32)) > 0
    return low


@triton.jit
def make_room(list_ptr, count, threshold, top_k, capacity, S: tl.constexpr):
    """Prune lists by the threshold, and to the k best exactly where that leaves too many.

    Returns the new lengths and thresholds.
    """
    count = prune(list_ptr, order_bits(threshold).to(tl.int64) << 32, count, S)
    if 2 * tl.max(count) > capacity:
        least = kth_sort_key(list_ptr, count, top_k, S)
        count = prune(list_ptr, least, count, S)
        threshold = tl.maximum(threshold, key_score(least))
    return count, threshold
