"""A threshold that k of a row's scores reach, from the maxima of disjoint groups of keys.

The k-th largest of the maxima is one: k groups hold a score that reaches it.
"""

import triton
import triton.language as tl

from .layout import row_max, row_sum

# Steps of the bisection.
ROUNDS = tl.constexpr(6)


@triton.jit
def raise_threshold(threshold, maxima, top_k, ROWS: tl.constexpr):
    """A maximum that top_k of the maxima [2, C, THREADS] reach, if the threshold is not above."""
    low = tl.maximum(threshold, -row_max(-tl.min(maxima, 1), ROWS))
    high = row_max(tl.max(maxima, 1), ROWS)
    for _ in tl.range(ROUNDS, num_stages=1):
        # Finite, and without overflow.
        middle = 0.5 * tl.maximum(low, -3e38) + 0.5 * tl.minimum(high, 3e38)
        reach = tl.sum((maxima >= middle[:, None, :]).to(tl.float32), 1)
        enough = row_sum(reach, ROWS) >= top_k
        low = tl.where(enough, tl.maximum(middle, low), low)
        high = tl.where(enough, high, middle)
    # One that is a score: so what equals it is known for a tie.
    least = tl.min(tl.where(maxima >= low[:, None, :], maxima, float("inf")), 1)
    least = -row_max(-least, ROWS)
    return tl.where(least < float("inf"), tl.maximum(least, low), low)
