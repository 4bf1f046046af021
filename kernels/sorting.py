"""Bitonic sorting of short lists, laid out so that most steps stay inside a thread.

Sort form. Lists of EACH * LANES integer keys, as [EACH, HIGH, LANES, LOW]: rank lane * EACH + own
of list high * LOW + low. The first axis lies in a thread's registers, the lanes of a list in one
warp (while LANES * LOW <= 64: a thread takes two lists), so steps shorter than EACH move nothing.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def lists_a_warp(rows, lanes):
    """How many of `rows` lists of `lanes` lanes to give a warp: at least two, if there are."""
    return min(rows, max(2, 64 // lanes))


@triton.constexpr_function
def warps_of_lists(most, warps, width):
    """How many times the lists of a warp, `width` places, to sort at once; at most `most`."""
    return min(most, max(1, warps * 64 // width))


@triton.constexpr_function
def wide_each(log_size):
    """The keys of a list in a thread where registers are dear."""
    return min(4, max(2, 2**log_size // 32))


@triton.jit
def sort_ranks(EACH: tl.constexpr, LANES: tl.constexpr):
    """The rank of each place of a list in sort form, [EACH, 1, LANES, 1]."""
    own = tl.arange(0, EACH)[:, None, None, None]
    return own + tl.arange(0, LANES)[None, None, :, None] * EACH


@triton.jit
def sort_rows(HIGH: tl.constexpr, LOW: tl.constexpr):
    """The list of each place in sort form, [1, HIGH, 1, LOW]."""
    return tl.arange(0, HIGH)[None, :, None, None] * LOW + tl.arange(0, LOW)[None, None, None, :]


@triton.jit
def exchange(x, STRIDE: tl.constexpr, RUN: tl.constexpr):
    """Order every two keys STRIDE ranks apart; runs of RUN ranks descend and ascend by turns."""
    EACH: tl.constexpr = x.shape[0]
    HIGH: tl.constexpr = x.shape[1]
    LANES: tl.constexpr = x.shape[2]
    LOW: tl.constexpr = x.shape[3]
    if STRIDE < EACH:
        FRONT: tl.constexpr = EACH // (2 * STRIDE)
        REST: tl.constexpr = HIGH * LANES * LOW
        pair = tl.reshape(x, [FRONT, 2, STRIDE, REST])
        other = tl.sum(pair, 1, keep_dims=True) - pair
        second = tl.arange(0, 2)[None, :, None, None] == 1
        if RUN < EACH:
            run = tl.arange(0, FRONT)[:, None, None, None] // (RUN // (2 * STRIDE))
        else:
            run = tl.arange(0, REST)[None, None, None, :] // LOW % LANES // (RUN // EACH)
    else:
        APART: tl.constexpr = STRIDE // EACH
        BLOCKS: tl.constexpr = LANES // (2 * APART)
        pair = tl.reshape(x, [EACH * HIGH, BLOCKS, 2, APART * LOW])
        other = tl.sum(pair, 2, keep_dims=True) - pair
        second = tl.arange(0, 2)[None, None, :, None] == 1
        run = tl.arange(0, BLOCKS)[None, :, None, None] // (RUN // (2 * STRIDE))
    kept = tl.where(second != (run % 2 == 1), tl.minimum(pair, other), tl.maximum(pair, other))
    return tl.reshape(kept, [EACH, HIGH, LANES, LOW])


@triton.jit
def merge(x, LOG_RUN: tl.constexpr):
    """Sort runs of 2 ** LOG_RUN ranks, each bitonic, to descend and ascend by turns."""
    for step in tl.static_range(LOG_RUN):
        x = exchange(x, 2 ** (LOG_RUN - 1 - step), 2**LOG_RUN)
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
