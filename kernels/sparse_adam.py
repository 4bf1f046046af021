"""Adam on the rows of a table that have a gradient, in one pass.

Shapes: K rows of width d, M of them with a gradient.
    param, exp_avg, exp_avg_sq, master [K, d]; rows [M] int64; grad_rows [M, d]
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import grid, second_axis


@triton.jit
def round_stochastically(x, random, dtype: tl.constexpr):
    """float32 to one of its two neighbours in bfloat16 or float16, unbiased.

    `random` is uint32. Added below the last bit that is kept, it carries as often as it should.
    """
    bits = x.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        mask = tl.full(x.shape, 0xFFFF, tl.int32)
    else:
        # Below 2 ** -14 the spacing of float16 stays 2 ** -24: of the 24 bits more are dropped.
        exponent = (bits >> 23) & 0xFF
        dropped = tl.minimum(13 + tl.maximum(113 - exponent, 0), 31)
        mask = (tl.full(x.shape, 1, tl.int32) << tl.minimum(dropped, 23)) - 1
    added = (bits + (random.to(tl.int32, bitcast=True) & mask)) & ~mask
    rounded = added.to(tl.float32, bitcast=True)
    if dtype != tl.bfloat16:
        # Less than one spacing: up to it with the probability x / 2 ** -24, else to zero.
        chance = (random >> 8).to(tl.float32) * 2.0**-24
        up = tl.where(chance < tl.abs(x) * 2.0**24, 2.0**-24, 0.0)
        rounded = tl.where(tl.abs(x) < 2.0**-24, tl.where(x < 0, -up, up), rounded)
    # Infinity and NaN stay as they are.
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded).to(dtype)


@triton.jit
def adam_update(
    param_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, place, mask, grad, step_size, decay,
    first_share, second_share, eps, seed, step,
    MAXIMIZE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One step, in place, on the elements at `place`, whose gradient is float32."""
    if MAXIMIZE:
        grad = -grad
    first = tl.load(exp_avg_ptr + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(exp_avg_sq_ptr + place, mask=mask, other=0.0).to(tl.float32)
    first += (grad - first) * first_share
    second += (grad * grad - second) * second_share
    tl.store(exp_avg_ptr + place, first.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + place, second.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    source_ptr = master_ptr if MASTER else param_ptr
    value = tl.load(source_ptr + place, mask=mask, other=0.0).to(tl.float32)
    value = value * decay
    value -= step_size * tl.div_rn(first, tl.sqrt_rn(second) + eps)
    if MASTER:
        tl.store(master_ptr + place, value, mask=mask)
    if STOCHASTIC:
        # Counted by element and step, so that a run repeats to the bit.
        low = (place & 0xFFFFFFFF).to(tl.uint32)
        high = (place >> 32).to(tl.uint32)
        count = tl.zeros_like(low) + step
        random, _, _, _ = tl.philox(seed, low, high, count.to(tl.uint32), tl.zeros_like(low))
        rounded = round_stochastically(value, random, param_ptr.dtype.element_ty)
    else:
        rounded = value.to(param_ptr.dtype.element_ty)
    tl.store(param_ptr + place, rounded, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "table_rows", "seed", "step"])
def sparse_adam_kernel(
    param_ptr,  # [K, D]
    exp_avg_ptr,  # [K, D]
    exp_avg_sq_ptr,  # [K, D]
    master_ptr,  # [K, D] float32; if MASTER
    scalars_ptr,  # [2]: step size and decay; if ON_DEVICE
    step_ptr,  # []; if ON_DEVICE
    rows_ptr,  # [M]
    grad_rows_ptr,  # [M, D]
    num_rows, table_rows, step_size, decay, first_share, second_share, eps, seed, step,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of ROWS of the rows that have a gradient."""
    if ON_DEVICE:
        step_size = tl.load(scalars_ptr)
        decay = tl.load(scalars_ptr + 1)
        step = tl.load(step_ptr).to(tl.int32)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row = tl.load(rows_ptr + index, mask=index < num_rows, other=-1)
    column = second_axis().to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row >= 0) & (row < table_rows) & (column < D)
    grad = tl.load(grad_rows_ptr + index * D + column, mask=mask, other=0.0).to(tl.float32)
    adam_update(
        param_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, row * D + column, mask, grad,
        step_size, decay, first_share, second_share, eps, seed, step, MAXIMIZE, MASTER, STOCHASTIC,
    )  # fmt: skip


class AdamArguments(NamedTuple):
    """What a kernel that makes the step takes: first `tensors`, last `numbers`; and `constants`."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[float | int, ...]
    constants: dict[str, Any]


def adam_arguments(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    maximize: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    master: Tensor | None = None,
) -> AdamArguments:
    """The kernels' arguments, from those of `sparse_adam`."""
    scalars = steps = param
    step_size, decay, number = 0.0, 1.0, 0
    on_device = any(
        isinstance(x, Tensor) and (x.device.type != "cpu" or x.device == param.device)
        for x in (lr, step)
    )
    if on_device:
        # A few launches on single numbers, in float64, rather than a wait for the device.
        steps = torch.as_tensor(step, device=param.device)
        wide = steps.to(torch.float64)
        size = lr * (1 - beta2**wide).sqrt() / (1 - beta1**wide)
        rest = 1 - lr * weight_decay + torch.zeros_like(wide)
        scalars = torch.stack([size, rest]).to(torch.float32)
    else:
        lr, number = float(lr), int(step)
        step_size = lr * math.sqrt(1 - beta2**number) / (1 - beta1**number)
        decay = 1 - lr * weight_decay
    half = param.dtype in (torch.bfloat16, torch.float16)
    return AdamArguments(
        (param, exp_avg, exp_avg_sq, param if master is None else master, scalars, steps),
        (step_size, decay, 1 - beta1, 1 - beta2, eps, seed, number),
        {
            "MAXIMIZE": maximize,
            "MASTER": master is not None,
            "STOCHASTIC": stochastic_rounding and half,
            "ON_DEVICE": on_device,
            "num_stages": 1,
            # A product added to a sum is rounded in between, as torch rounds it.
            "enable_fp_fusion": False,
        },
    )


def update_rows(rows: Tensor, grad_rows: Tensor, arguments: AdamArguments) -> None:
    """Launch the step on `rows`."""
    num_rows, width = grad_rows.shape
    block = min(triton.next_power_of_2(width), 1024)
    share = max(1, 1024 // block)
    sparse_adam_kernel[grid(triton.cdiv(num_rows, share), triton.cdiv(width, block))](
        *arguments.tensors, rows, grad_rows, num_rows, arguments.tensors[0].shape[0],
        *arguments.numbers, D=width, BLOCK=block, ROWS=share, num_warps=4, **arguments.constants,
    )  # fmt: skip


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    **options: Any,
) -> None:
    """One step of Adam on some rows, in place, as `torch.optim.SparseAdam` makes it.

    Args:
        param: [K, d].
        exp_avg: [K, d], the first moment.
        exp_avg_sq: [K, d], the second.
        rows: [M], int64, each once. One out of [0, K) is passed over.
        grad_rows: [M, d], their gradient; NaN goes into the moments and values of its element.
        **options: see `reference.sparse_adam`:
            lr: the learning rate; on the device if it is a tensor there.
            beta1: the decay of the first moment.
            beta2: that of the second.
            eps: added to the root of the second moment.
            weight_decay: decoupled: the rows are multiplied by 1 - lr · weight_decay before.
            step: the number of this step, from 1; on the device if it is a tensor there.
            maximize: ascend.
            stochastic_rounding: round a bfloat16 or float16 param up or down at random, unbiased.
            seed: of that rounding. Same seed, step and inputs, same bits.
            master: [K, d], float32, the values that are kept; param becomes their rounding.
    """
    if rows.shape[0] > 0:
        update_rows(rows, grad_rows, adam_arguments(param, exp_avg, exp_avg_sq, **options))


def shipped_configurations() -> dict[str, Callable[[], object]]:
    """A call that launches each configuration, by name; for reports, on tensors without data."""

    def call(
        dtype: torch.dtype, width: int, stochastic_rounding: bool, with_master: bool
    ) -> Callable[[], object]:
        def on_meta(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        param, grad_rows = on_meta(dtype, 1 << 18, width), on_meta(dtype, 1 << 16, width)
        master, *moments = (on_meta(torch.float32, 1 << 18, width) for _ in range(3))
        return lambda: sparse_adam(
            param, *moments, on_meta(torch.int64, 1 << 16), grad_rows, lr=0.1, beta1=0.9,
            beta2=0.999, eps=1e-8, weight_decay=0.0, step=1,
            stochastic_rounding=stochastic_rounding, master=master if with_master else None,
        )  # fmt: skip

    return {
        "adam bfloat16 1024 stochastic": call(torch.bfloat16, 1024, True, False),
        "adam bfloat16 1024 master": call(torch.bfloat16, 1024, False, True),
        "adam float32 1024": call(torch.float32, 1024, False, False),
        "adam float32 100": call(torch.float32, 100, False, False),
    }
