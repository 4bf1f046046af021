"""Grids of two axes that may be longer than a GPU's.

Along x a GPU takes 2³¹ - 1 programs, along y and z 65,535 each. So what is many goes first, and a
long second axis is folded over y and z.
"""

import triton
import triton.language as tl

MOST_ALONG_X = 2**31 - 1
MOST_ALONG_Y = 65535
MOST_ALONG_Z = 65535


@triton.jit
def second_axis():
    """The program's number along the second axis of `grid`."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


def grid(first: int, second: int) -> tuple[int, int, int]:
    """Programs for `first` · `second` pieces of work: `tl.program_id(0)` and `second_axis()`.

    Where the second axis is folded its numbers may go beyond `second`, as columns of a last block
    go beyond a row: those programs must mask all they load and store.

    Raises:
        ValueError: if there are more pieces than a GPU takes programs.
    """
    folds = max(1, triton.cdiv(second, MOST_ALONG_Y))
    if first > MOST_ALONG_X or folds > MOST_ALONG_Z:
        raise ValueError(
            f"{first} by {second} programs are too many: a GPU takes at most {MOST_ALONG_X} by "
            f"{MOST_ALONG_Y * MOST_ALONG_Z}"
        )
    return first, triton.cdiv(second, folds), folds
