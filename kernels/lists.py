"""Lists of candidates in memory, and their sorting.

A program keeps a list for each of its ROWS rows, in memory that stays in cache: slot s of row r is
at list_ptr + s * ROWS + r. An entry is an int64, a score's float32 bits above its key's index. Slot
LIST of a list is its head: a bound (see `ordered`) that the k best reach, above the length.
"""

import triton
import triton.language as tl

from .sorting import keys_each, lists_a_warp, ranks, sort_rows, sort_top, warps_of_lists


@triton.jit
def ordered(bits):
    """The int32 that orders as the float32 with these bits does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def entry_of(score, index):
    """The entry of a score and its key, which is not negative."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits.to(tl.int64) << 32) | index.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def bits_of(entry):
    """The bits of an entry's score."""
    return (entry >> 32).to(tl.int32)


@triton.jit
def score_of(entry):
    """An entry's score."""
    return bits_of(entry).to(tl.float32, bitcast=True)


@triton.jit
def index_of(entry):
    """An entry's key."""
    return entry.to(tl.int32)


@triton.jit
def store_head(list_ptr, bound, count, row, ROWS: tl.constexpr, LOG_LIST: tl.constexpr):
    """Store the heads of the lists of some rows: what their best reach, and their lengths."""
    head = ordered(bound.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    tl.store(list_ptr + 2**LOG_LIST * ROWS + row, head | count.to(tl.int64))


@triton.jit
def load_bits(entry_ptr, mask):
    """The bits of the scores of entries, their upper halves; -inf's where masked."""
    return tl.load(entry_ptr.to(tl.pointer_type(tl.int32)) + 1, mask=mask, other=-0x800000)


@triton.jit
def ordered_pair(bits, index):
    """The int64 that orders by score, NaN first, then by lower index."""
    key = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, ordered(bits))
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def narrow_key(bits, bound, LOG_SIZE: tl.constexpr):
    """An int32 that orders by score, then by lower rank, and whether it does so exactly.

    bits, in sort form, of scores; bound, of which enough are above, `ordered`. The bits of a key
    but for the lowest LOG_SIZE, its rank's, say how far its score is above the bound, as far as
    that fits. Scores below the bound are all one. Not exact where a score is NaN or too far above.
    """
    EACH: tl.constexpr = bits.shape[0]
    LANES: tl.constexpr = bits.shape[2]
    own = EACH - 1 - tl.arange(0, EACH)[:, None, None, None]
    lane = EACH * (LANES - 1 - tl.arange(0, LANES)[None, None, :, None])
    value = ordered(bits)
    # From the least int32 on. The order of the sums is for the sake of registers.
    key = ((value << LOG_SIZE) + (lane - (bound << LOG_SIZE) + -0x80000000)) ^ own
    key = tl.where(value >= bound, key, -0x80000000)
    # Compared unsigned, a difference beyond int32 is too large as well.
    above = tl.maximum(tl.max(value, 0, keep_dims=True), bound) - bound
    exact = above.to(tl.uint32, bitcast=True) < 2 ** (32 - LOG_SIZE)
    # A NaN may have either sign.
    largest = tl.max(bits & 0x7FFFFFFF, 0, keep_dims=True)
    return key, exact & (largest <= 0x7F800000)


@triton.jit
def narrow_rank(key, LOG_SIZE: tl.constexpr):
    """The rank in a key of `narrow_key`."""
    return 2**LOG_SIZE - 1 - (key & (2**LOG_SIZE - 1))


@triton.jit
def narrow_score(key, bound, LOG_SIZE: tl.constexpr):
    """The score in a key of `narrow_key`."""
    above = (key ^ -0x80000000).to(tl.uint32, bitcast=True) >> LOG_SIZE
    return ordered(above.to(tl.int32, bitcast=True) + bound).to(tl.float32, bitcast=True)


@triton.jit
def slot_pointers(
    list_ptr, first_row, ROWS: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Where the slots of some lists are, in sort form."""
    lane = tl.arange(0, LANES)[None, None, :, None]
    own = tl.arange(0, EACH)[:, None, None, None]
    # A thread's slots are a constant apart: one address, and offsets that cost nothing.
    return (list_ptr + (lane * (EACH * ROWS) + first_row + sort_rows(HIGH, LOW))) + own * ROWS


@triton.jit
def sort_wide(
    list_ptr, first_row, TOP_K: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr,
    EACH: tl.constexpr, LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Sort some lists as `sort_lists` does, whatever they hold."""
    LANES: tl.constexpr = 2**LOG_LIST // EACH
    TOP_LANES: tl.constexpr = 2**LOG_TOP // EACH
    row = first_row + sort_rows(HIGH, LOW)
    length = index_of(tl.load(list_ptr + 2**LOG_LIST * ROWS + row))
    lane = tl.arange(0, LANES)[None, None, :, None]
    valid = tl.arange(0, EACH)[:, None, None, None] < length - EACH * lane
    place = slot_pointers(list_ptr, first_row, ROWS, EACH, LANES, HIGH, LOW)
    entry = tl.load(place, mask=valid, other=0)
    key = ordered_pair(bits_of(entry), index_of(entry))
    key = sort_top(tl.where(valid, key, -0x8000000000000000), LOG_LIST, LOG_TOP)
    best = (ordered(bits_of(key)).to(tl.int64) << 32) | (0x7FFFFFFF - (key & 0x7FFFFFFF))
    # All of a list is read before its start is written.
    tl.debug_barrier()
    place = slot_pointers(list_ptr, first_row, ROWS, EACH, TOP_LANES, HIGH, LOW)
    tl.store(place, best, mask=ranks(EACH, TOP_LANES) < TOP_K)


@triton.jit
def sort_narrow(
    list_ptr, first_row, TOP_K: tl.constexpr, ROWS: tl.constexpr, LOG_LIST: tl.constexpr,
    LOG_SHORT: tl.constexpr, LOG_TOP: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Sort HIGH * LOW lists by narrow keys, if that is exact for all of them; whether it was."""
    EACH: tl.constexpr = keys_each(LOG_TOP, 32)
    LANES: tl.constexpr = 2**LOG_SHORT // EACH
    TOP_LANES: tl.constexpr = 2**LOG_TOP // EACH
    row = first_row + sort_rows(HIGH, LOW)
    head = tl.load(list_ptr + 2**LOG_LIST * ROWS + row)
    length = index_of(head)
    place = slot_pointers(list_ptr, first_row, ROWS, EACH, LANES, HIGH, LOW)
    lane = tl.arange(0, LANES)[None, None, :, None]
    mask = tl.arange(0, EACH)[:, None, None, None] < length - EACH * lane
    key, exact = narrow_key(load_bits(place, mask), bits_of(head), LOG_SHORT)
    exact = exact & (length <= 2**LOG_SHORT)
    all_exact = tl.min(exact.to(tl.int32)) != 0
    if all_exact:
        slot = narrow_rank(sort_top(key, LOG_SHORT, LOG_TOP), LOG_SHORT)
        best = tl.load((list_ptr + row) + slot * ROWS)
        # All of a list is read before its start is written.
        tl.debug_barrier()
        into = slot_pointers(list_ptr, first_row, ROWS, EACH, TOP_LANES, HIGH, LOW)
        tl.store(into, best, mask=ranks(EACH, TOP_LANES) < TOP_K)
    return all_exact


@triton.jit
def sort_longer(
    list_ptr, first_list, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    """Sort LISTS lists as `sort_lists` does, however long and whatever they hold."""
    LOG_LONG: tl.constexpr = min(LOG_LIST, max(7, LOG_TOP + 2))
    LANES: tl.constexpr = max(1, 2**LOG_LONG // keys_each(LOG_TOP, 32))
    LOW: tl.constexpr = lists_a_warp(LISTS, LANES)
    HIGH: tl.constexpr = warps_of_lists(LISTS // LOW, WARPS, LANES * LOW)
    WIDE_EACH: tl.constexpr = keys_each(LOG_TOP, 8)
    WIDE_LANES: tl.constexpr = 2**LOG_LIST // WIDE_EACH
    WIDE_LOW: tl.constexpr = lists_a_warp(HIGH * LOW, WIDE_LANES)
    WIDE_HIGH: tl.constexpr = warps_of_lists(HIGH * LOW // WIDE_LOW, WARPS, WIDE_LANES * WIDE_LOW)
    for first_row in tl.range(
        first_list, first_list + LISTS, HIGH * LOW, num_stages=1, disable_licm=True
    ):
        exact = False
        if LOG_LONG <= 8:
            exact = sort_narrow(
                list_ptr, first_row, TOP_K, ROWS, LOG_LIST, LOG_LONG, LOG_TOP, HIGH, LOW
            )  # fmt: skip
        if not exact:
            for wide_row in tl.range(
                first_row,
                first_row + HIGH * LOW,
                WIDE_HIGH * WIDE_LOW,
                num_stages=1,
                disable_licm=True,
            ):
                sort_wide(
                    list_ptr, wide_row, TOP_K, ROWS, WIDE_HIGH, WIDE_LOW, WIDE_EACH, LOG_LIST,
                    LOG_TOP,
                )  # fmt: skip


@triton.jit
def sort_lists(
    list_ptr, longest, TOP_K: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    LOG_LIST: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Leave the TOP_K best entries of each list, the longest of which has `longest`, at its start.

    In order. TOP_K <= 2 ** LOG_TOP. Nearly always the lists are short, and their scores so near
    each other that an int32 orders them exactly, far cheaper to sort than the int64 that always
    does.
    """
    LOG_SHORT: tl.constexpr = max(6, LOG_TOP + 1)
    if LOG_SHORT < LOG_LIST:
        LANES: tl.constexpr = 2**LOG_SHORT // keys_each(LOG_TOP, 32)
        LOW: tl.constexpr = lists_a_warp(ROWS, LANES)
        HIGH: tl.constexpr = warps_of_lists(ROWS // LOW, WARPS, LANES * LOW)
        for first_row in tl.range(0, ROWS, HIGH * LOW, num_stages=1, disable_licm=True):
            exact = longest <= 2**LOG_SHORT
            if exact:
                exact = sort_narrow(
                    list_ptr, first_row, TOP_K, ROWS, LOG_LIST, LOG_SHORT, LOG_TOP, HIGH, LOW
                )  # fmt: skip
            if not exact:
                sort_longer(
                    list_ptr, first_row, TOP_K, ROWS, WARPS, LOG_LIST, LOG_TOP, HIGH * LOW
                )  # fmt: skip
    else:
        sort_longer(list_ptr, 0, TOP_K, ROWS, WARPS, LOG_LIST, LOG_TOP, ROWS)


@triton.constexpr_function
def rows_at_once(rows, log_top):
    """How many of `rows` lists to copy at once: what moves between threads takes shared memory."""
    return min(rows, 2 ** (13 - log_top))


@triton.jit
def store_best(
    list_ptr, scores_ptr, slots_ptr, first, num_rows, STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Copy the TOP_K entries each list starts with: rank a of row r to first + r * STRIDE + a.

    A NaN among a row's scores came first, and makes NaN of them all.
    """
    SOME: tl.constexpr = rows_at_once(ROWS, LOG_TOP)
    rank = tl.arange(0, 2**LOG_TOP)[None, :]
    for first_row in tl.range(0, ROWS, SOME, num_stages=1):
        row = first_row + tl.arange(0, SOME)[:, None]
        mask = (rank < TOP_K) & (row < num_rows)
        best = score_of(tl.load(list_ptr + row))
        entry = tl.load(list_ptr + rank * ROWS + row, mask=mask, other=0)
        score = tl.where(best != best, float("nan"), score_of(entry))
        place = (first + row.to(tl.int64) * STRIDE) + rank
        tl.store(scores_ptr + place, score, mask=mask)
        tl.store(slots_ptr + place, index_of(entry), mask=mask)


@triton.jit
def load_best(
    list_ptr, scores_ptr, slots_ptr, first, num_rows, STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    ROWS: tl.constexpr, LOG_TOP: tl.constexpr,
):  # fmt: skip
    """Undo `store_best`."""
    SOME: tl.constexpr = rows_at_once(ROWS, LOG_TOP)
    rank = tl.arange(0, 2**LOG_TOP)[None, :]
    for first_row in tl.range(0, ROWS, SOME, num_stages=1):
        row = first_row + tl.arange(0, SOME)[:, None]
        mask = (rank < TOP_K) & (row < num_rows)
        place = (first + row.to(tl.int64) * STRIDE) + rank
        score = tl.load(scores_ptr + place, mask=mask, other=0.0)
        slot = tl.load(slots_ptr + place, mask=mask, other=0)
        tl.store(list_ptr + rank * ROWS + row, entry_of(score, slot), mask=rank < TOP_K)
