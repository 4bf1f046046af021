"""Bitonic sorting of short lists, laid out so that most steps stay inside a thread.

Sort form. Lists of EACH * LANES integer keys, as [EACH, HIGH, LANES, LOW]: rank lane * EACH + own
of list high * LOW + low. The first axis lies in a thread's registers, the lanes of a list in one
warp, so steps shorter than EACH move nothing, and which of two keys stays is known beforehand.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def keys_each(log_top, most, lists, log_size, warps):
    """How many keys of a list to give a thread, of `lists` lists of 2 ** log_size.

    A sorted run, if that is not more than `most` and leaves no thread idle.
    """
    return max(1, min(most, 2**log_top, lists * 2**log_size // (32 * warps)))


@triton.constexpr_function
def lists_a_warp(rows, lanes):
    """How many of `rows` lists of `lanes` lanes to give a warp: at least one."""
    return min(rows, max(1, 32 // lanes))


@triton.constexpr_function
def warps_of_lists(most, warps, width):
    """How many times the lists of a warp, `width` places, to sort at once; at most `most`."""
    return min(most, max(1, warps * 32 // width))


@triton.jit
def ranks(EACH: tl.constexpr, LANES: tl.constexpr):
    """The rank of each place of a list in sort form, [EACH, 1, LANES, 1]."""
    own = tl.arange(0, EACH)[:, None, None, None]
    return own + tl.arange(0, LANES)[None, None, :, None] * EACH


@triton.jit
def sort_rows(HIGH: tl.constexpr, LOW: tl.constexpr):
    """The list of each place in sort form, [1, HIGH, 1, LOW]."""
    row = tl.arange(0, HIGH)[None, :, None, None] * LOW + tl.arange(0, LOW)[None, None, None, :]
    # The compiler would load neighbours in memory into one thread; told that there are none, it
    # keeps a thread's registers for the first axis.
    return tl.max_contiguous(row, [1, 1, 1, 1])


@triton.jit
def exchange(x, STRIDE: tl.constexpr, RUN: tl.constexpr):
    """Order every two keys STRIDE ranks apart, the larger first.

    Runs of RUN ranks shorter than EACH descend and ascend by turns.
    """
    EACH: tl.constexpr = x.shape[0]
    HIGH: tl.constexpr = x.shape[1]
    LANES: tl.constexpr = x.shape[2]
    LOW: tl.constexpr = x.shape[3]
    if STRIDE < EACH:
        FRONT: tl.constexpr = EACH // (2 * STRIDE)
        pair = tl.reshape(x, [FRONT, 2, STRIDE, HIGH * LANES * LOW])
        other = tl.sum(pair, 1, keep_dims=True) - pair
        second = tl.arange(0, 2)[None, :, None, None] == 1
        run = tl.arange(0, FRONT)[:, None, None, None] // (RUN // (2 * STRIDE))
        smaller = second != ((run % 2 == 1) & (RUN < EACH))
    else:
        APART: tl.constexpr = STRIDE // EACH
        pair = tl.reshape(x, [EACH * HIGH, LANES // (2 * APART), 2, APART * LOW])
        other = tl.sum(pair, 2, keep_dims=True) - pair
        smaller = tl.arange(0, 2)[None, None, :, None] == 1
    if x.dtype == tl.int64:
        # Only the upper halves are compared: of two equal ones both keep their places.
        one = (pair >> 32).to(tl.int32)
        two = (other >> 32).to(tl.int32)
        kept = tl.where(tl.where(smaller, two < one, two > one), other, pair)
    else:
        kept = tl.where(smaller, tl.minimum(pair, other), tl.maximum(pair, other))
    return tl.reshape(kept, [EACH, HIGH, LANES, LOW])


@triton.jit
def turn_odd_runs(x, RUN: tl.constexpr):
    """Turn the order of the keys of every second run of RUN >= EACH ranks round; its own inverse.

    Cheaper than to choose in every step after which of two keys is to stay.
    """
    run = tl.arange(0, x.shape[2])[None, None, :, None] // (RUN // x.shape[0])
    return x ^ -(run % 2).to(x.dtype)


@triton.jit
def merge(x, LOG_RUN: tl.constexpr):
    """Sort runs of 2 ** LOG_RUN ranks, each bitonic, to descend and ascend by turns."""
    # Triton before 3.9 takes no chained comparison.
    LONG: tl.constexpr = x.shape[0] <= 2**LOG_RUN
    SEVERAL: tl.constexpr = LONG and x.shape[0] * x.shape[2] > 2**LOG_RUN
    if SEVERAL:
        x = turn_odd_runs(x, 2**LOG_RUN)
    for step in tl.static_range(LOG_RUN):
        x = exchange(x, 2 ** (LOG_RUN - 1 - step), 2**LOG_RUN)
    if SEVERAL:
        x = turn_odd_runs(x, 2**LOG_RUN)
    return x


@triton.jit
def halve(x, LOG_TOP: tl.constexpr):
    """The larger half of each two runs of 2 ** LOG_TOP ranks, sorted.

    One run descends and the other ascends, so the larger of each two keys that stand at the same
    place are the larger half, and bitonic.
    """
    EACH: tl.constexpr = x.shape[0]
    HIGH: tl.constexpr = x.shape[1]
    LEFT: tl.constexpr = x.shape[2] // 2
    LOW: tl.constexpr = x.shape[3]
    RUN: tl.constexpr = 2**LOG_TOP // EACH
    x = tl.max(tl.reshape(x, [EACH * HIGH, LEFT // RUN, 2, RUN * LOW]), 2)
    return merge(tl.reshape(x, [EACH, HIGH, LEFT, LOW]), LOG_TOP)


@triton.jit
def sort_top(x, LOG_SIZE: tl.constexpr, LOG_TOP: tl.constexpr):
    """The 2 ** LOG_TOP largest of the 2 ** LOG_SIZE keys of each list, descending, in sort form."""
    for log_run in tl.static_range(1, LOG_TOP + 1):
        x = merge(x, log_run)
    for _ in tl.static_range(LOG_SIZE - LOG_TOP):
        x = halve(x, LOG_TOP)
    return x
