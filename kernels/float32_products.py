"""Products of float32 on tensor cores of float16: three for one.

A row of numbers is a power of two, its unit, times numbers below 2 ** 15, and each of these is a
float16 and, of what that leaves, another: all but 2 ** -23 of it. Numbers 2 ** 17 times smaller
than the largest of their row are less exact, by 2 ** -38 of that one. The product of two rows is
that of their first parts and the two of a first and a second part; that of the second parts, at
most 2 ** -22 of it, is left out, as tf32 does that is multiplied three times for one.

Tensor cores multiply float16 twice as fast as tf32, and what was split stays in shared memory.
They round each step of a sum, so they sum a slice of the columns, and slices are added in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .assembly import plus


@triton.constexpr_function
def part_width(dim):
    """Elements of a row of parts in memory: so many that rows start aligned."""
    return (dim + 7) // 8 * 8


@triton.constexpr_function
def slice_width(block_d):
    """Columns that a tensor core sums."""
    return min(block_d, 128)


@triton.jit
def row_unit(most):
    """The units of rows, whose largest numbers these are, and their reciprocals."""
    # 2 ** 14 is at most what remains, or 2 ** 15 if it is no power of two. Not below 2 ** -126,
    # where units would round.
    exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) - 14, 1)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    return unit, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Both float16 parts of numbers below 2 ** 15. Of infinite ones the second is NaN."""
    first = x.to(tl.float16)
    return first, (x - first.to(tl.float32)).to(tl.float16)


@triton.jit
def finite(x):
    """x, but 0 where it is infinite or NaN: there the first parts say it all."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def product_of_parts(first, second, other_first, other_second):
    """The product of matrices in two parts each, [R, D] and [D, C]."""
    product = finite(tl.dot(first, other_second))
    product = plus(product, finite(tl.dot(second, other_first)))
    return plus(product, tl.dot(first, other_first))


@triton.jit
def add_product_of_parts(total, first, second, other_first, other_second):
    """total + `product_of_parts`, in fewer registers."""
    total = plus(total, finite(tl.dot(first, other_second)))
    total = plus(total, finite(tl.dot(second, other_first)))
    return plus(total, tl.dot(first, other_first))


@triton.jit(do_not_specialize=["num_keys"])
def split_keys_kernel(
    keys_ptr,  # [keys, D]
    parts_ptr,  # [keys, 2, WIDTH], float16
    units_ptr,  # [keys], float32
    num_keys, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program owns KEYS keys."""
    key = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = key[:, None] < num_keys
    keys = tl.load(keys_ptr + (key[:, None] * D + d), mask=inside & (d < D), other=0.0)
    keys = keys.to(tl.float32)
    unit, scale = row_unit(tl.max(tl.abs(keys), 1))
    first, second = split(keys * scale[:, None])
    place = parts_ptr + (key[:, None] * (2 * WIDTH) + d)
    tl.store(place, first, mask=inside & (d < WIDTH))
    tl.store(place + WIDTH, second, mask=inside & (d < WIDTH))
    tl.store(units_ptr + key, unit, mask=key < num_keys)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of keys [..., D], float16 [..., 2, WIDTH], and their units, float32 [...].

    WIDTH is D or a little more, filled with zeros.
    """
    *sizes, dim = keys.shape
    width = part_width(dim)
    parts = keys.new_empty(*sizes, 2, width, dtype=torch.float16)
    units = keys.new_empty(sizes, dtype=torch.float32)
    block_d = triton.next_power_of_2(width)
    at_once = max(1, 4096 // block_d)
    split_keys_kernel[(triton.cdiv(units.numel(), at_once),)](
        keys, parts, units, units.numel(), D=dim, WIDTH=width, BLOCK_D=block_d, KEYS=at_once,
    )  # fmt: skip
    return parts, units


def split_keys_bytes(num_keys: int, dim: int, size: int) -> dict[str, int]:
    """What `split_keys` moves of each tensor; `size` bytes are an element of the keys'."""
    return {
        "keys": num_keys * dim * size,
        "parts": num_keys * 2 * part_width(dim) * 2,
        "units": num_keys * 4,
    }
