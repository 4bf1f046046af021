"""What Triton does not say, and assembly does: the jit helpers, and the same in plain Triton."""

import triton
import triton.language as tl
from triton.language import target_info


@triton.constexpr_function
def for_nvidia():
    """Whether what is compiled is for NVIDIA, whose assembly this is, and is not interpreted."""
    return not triton.knobs.runtime.interpret and target_info.is_cuda()


@triton.jit
def plus(a, b):
    """a + b, as written: the compiler would start the product b from a, and round at each step."""
    if for_nvidia():
        return tl.inline_asm_elementwise(
            "add.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        return a + b


@triton.jit
def reaches(x, bound, WITH_NAN: tl.constexpr):
    """1.0 where x reaches the bound, as NaN does WITH_NAN, else 0.0.

    One instruction, and counts of such are sums of float32, on a pipe that is idle: the compiler
    would make a predicate, a choice by it and a sum of integers.
    """
    if for_nvidia():
        if WITH_NAN:
            SET: tl.constexpr = "set.geu.f32.f32 $0, $1, $2;"
        else:
            SET: tl.constexpr = "set.ge.f32.f32 $0, $1, $2;"
        bound = tl.broadcast_to(bound, x.shape)
        return tl.inline_asm_elementwise(
            SET, "=f,f,f", [x, bound], dtype=tl.float32, is_pure=True, pack=1
        )
    elif WITH_NAN:
        return tl.where(x < bound, 0.0, 1.0)
    else:
        return tl.where(x >= bound, 1.0, 0.0)


@triton.jit
def opaque(ptr):
    """The pointer, of which the compiler knows nothing.

    So that addresses made of it are not computed before a loop and kept in registers through it.
    """
    if for_nvidia():
        address = tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [ptr.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )
        return address.to(ptr.dtype)
    else:
        return ptr
