"""Adam on the rows of a table that have a gradient, in one pass.

Shapes: K rows of width d, M of them with a gradient.
    param, exp_avg, exp_avg_sq, master [K, d]; rows [M] int64; grad_rows [M, d]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import grid, second_axis
from .in_place import written
from .rounding import rounded_at


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
    rounded = rounded_at(value, place, seed, step, param_ptr.dtype.element_ty, STOCHASTIC)
    tl.store(param_ptr + place, rounded, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "table_rows", "seed", "step"])
def sparse_adam_kernel(
    param_ptr,  # [K, D]
    exp_avg_ptr,  # [K, D]
    exp_avg_sq_ptr,  # [K, D]
    master_ptr,  # [K, D] float32; if MASTER
    scalars_ptr,  # [2]: step size and decay; if ON_DEVICE
    step_ptr,  # []; if ON_DEVICE
    rows_ptr,  # [M]; unless ALL
    grad_rows_ptr,  # [M, D]
    num_rows, table_rows, step_size, decay, first_share, second_share, eps, seed, step,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MAXIMIZE: tl.constexpr,
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ON_DEVICE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of ROWS of the rows that have a gradient."""
    if ON_DEVICE:
        step_size = tl.load(scalars_ptr)
        decay = tl.load(scalars_ptr + 1)
        step = tl.load(step_ptr).to(tl.int32)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if ALL:
        row = tl.where(index < num_rows, index, -1)
    else:
        row = tl.load(rows_ptr + index, mask=index < num_rows, other=-1)
    column = second_axis().to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row >= 0) & (row < table_rows) & (column < D)
    grad = tl.load(grad_rows_ptr + index * D + column, mask=mask, other=0.0).to(tl.float32)
    adam_update(
        param_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, row * D + column, mask, grad,
        step_size, decay, first_share, second_share, eps, seed, step, MAXIMIZE, MASTER, STOCHASTIC,
    )  # fmt: skip


@dataclass(frozen=True)
class AdamOptions:
    """The options of a step.

    Attributes:
        lr: the learning rate; on the device if it is a tensor there.
        beta1: the decay of the first moment.
        beta2: that of the second.
        eps: added to the root of the second moment.
        weight_decay: decoupled: the rows are multiplied by 1 - lr · weight_decay before.
        step: the number of this step, from 1; on the device if it is a tensor there.
        maximize: ascend.
        stochastic_rounding: round a bfloat16 or float16 param up or down at random, unbiased.
        seed: of that rounding, below 2⁶³. Same seed, step and inputs, same bits.
        master: [K, d], float32, the values that are kept; param becomes their rounding.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int | Tensor
    maximize: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    master: Tensor | None = None


class AdamArguments(NamedTuple):
    """What a kernel that makes the step takes: first `tensors`, last `numbers`; and `constants`."""

    tensors: tuple[Tensor, ...]
    numbers: tuple[float | int, ...]
    constants: dict[str, Any]


def adam_arguments(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, options: AdamOptions
) -> AdamArguments:
    """The kernels' arguments."""
    lr, step = options.lr, options.step
    scalars = steps = param
    step_size, decay, number = 0.0, 1.0, 0
    on_device = any(
        isinstance(x, Tensor) and (x.device.type != "cpu" or x.device == param.device)
        for x in (lr, step)
    )
    if on_device:
        # A few launches on single numbers, in float64, rather than a wait for the device.
        steps = torch.as_tensor(step, dtype=torch.float32, device=param.device)
        wide = steps.to(torch.float64)
        size = lr * (1 - options.beta2**wide).sqrt() / (1 - options.beta1**wide)
        rest = 1 - lr * options.weight_decay + torch.zeros_like(wide)
        scalars = torch.stack([size, rest]).to(torch.float32)
    else:
        lr, number = float(lr), int(step)
        step_size = lr * math.sqrt(1 - options.beta2**number) / (1 - options.beta1**number)
        decay = 1.0 - lr * options.weight_decay
    shares = 1.0 - options.beta1, 1.0 - options.beta2
    master = options.master
    half = param.dtype in (torch.bfloat16, torch.float16)
    return AdamArguments(
        (param, exp_avg, exp_avg_sq, param if master is None else master, scalars, steps),
        (step_size, decay, *shares, float(options.eps), options.seed, number),
        {
            "MAXIMIZE": options.maximize,
            "MASTER": master is not None,
            "STOCHASTIC": options.stochastic_rounding and half,
            "ON_DEVICE": on_device,
            "num_stages": 1,
            # A product added to a sum is rounded in between, as torch rounds it.
            "enable_fp_fusion": False,
        },
    )


def update_rows(rows: Tensor | None, grad_rows: Tensor, arguments: AdamArguments) -> None:
    """Launch the step on `rows`; None: on all."""
    num_rows, width = grad_rows.shape
    block = min(triton.next_power_of_2(width), 1024)
    share = max(1, 1024 // block)
    sparse_adam_kernel[grid(triton.cdiv(num_rows, share), triton.cdiv(width, block))](
        *arguments.tensors, grad_rows if rows is None else rows, grad_rows, num_rows,
        arguments.tensors[0].shape[0], *arguments.numbers,
        D=width, BLOCK=block, ROWS=share, ALL=rows is None, num_warps=4, **arguments.constants,
    )  # fmt: skip
    written(*arguments.tensors[:4])


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    **options: Any,
) -> None:
    """One step of Adam on some rows, in place, as `torch.optim.SparseAdam` makes it.

    Args:
        param: [K, d].
        exp_avg: [K, d], the first moment.
        exp_avg_sq: [K, d], the second.
        rows: [M], int64, each once; one out of [0, K) is passed over. None: all rows, in order.
        grad_rows: [M, d], their gradient; NaN goes into the moments and values of its element.
        **options: see `AdamOptions`.
    """
    if grad_rows.shape[0] > 0:
        chosen = AdamOptions(**options)
        update_rows(rows, grad_rows, adam_arguments(param, exp_avg, exp_avg_sq, chosen))


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
