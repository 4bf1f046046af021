"""Adam on the rows that were read: one step over a table's touched rows, in place.

Shapes: K slots, M touched rows.
    param, exp_avg, exp_avg_sq, master [K, d_v]; rows [M]; grad_rows [M, d_v]
"""

import math

import torch
from torch import Tensor

# Rows are taken so many elements at a time, so that what is made of them stays in cache: measured
# best of 2^13 to 2^18 over 100,000 rows of 512.
ELEMENTS_AT_A_TIME = 1 << 16


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round float32 to bfloat16 or float16, up or down with the chances that keep the mean.

    Both formats are sign and magnitude: the next larger magnitude is the next integer.
    """
    nearest = x.to(dtype)
    bits = nearest.view(torch.int16)
    below = torch.where(nearest.float().abs() > x.abs(), bits - 1, bits)
    low, high = below.view(dtype).float(), (below + 1).view(dtype).float()
    chance = (x - low) / (high - low)
    up = torch.rand(x.shape, generator=generator, device=x.device) < chance
    rounded = torch.where(up, below + 1, below).view(dtype)
    return torch.where(x.isfinite(), rounded, nearest)


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
    master: Tensor | None = None,
) -> None:
    """One step of Adam on some rows of a table, as `torch.optim.SparseAdam` does it.

    Args:
        param: [K, d_v], updated in place.
        exp_avg: [K, d_v], float32 (float64 for float64), updated in place.
        exp_avg_sq: likewise.
        rows: [M], int64, each once.
        grad_rows: [M, d_v], their gradient.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled: a touched row first shrinks by the factor 1 - lr · weight_decay.
        step: how many steps have been made, this one included.
        maximize: go up the gradient.
        stochastic_rounding: round a bfloat16 or float16 `param` up or down at random, unbiased.
        seed: of that rounding; same seed, step and inputs, same bits.
        master: [K, d_v], float32, the values that `param` is rounded from; updated in place.
    """
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    state_dtype = exp_avg.dtype
    source = param if master is None else master
    generator = None
    if stochastic_rounding and param.dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator(param.device).manual_seed((seed << 32) + step)
    count = max(1, ELEMENTS_AT_A_TIME // max(1, param.shape[1]))
    for start in range(0, grad_rows.shape[0], count):
        grad = grad_rows[start : start + count].to(state_dtype)
        if maximize:
            grad = -grad
        some = rows[start : start + count]
        mean, square = exp_avg.index_select(0, some), exp_avg_sq.index_select(0, some)
        mean.add_((grad - mean).mul_(1 - beta1))
        square.add_(grad.square().sub_(square).mul_(1 - beta2))
        exp_avg.index_copy_(0, some, mean)
        exp_avg_sq.index_copy_(0, some, square)
        value = source.index_select(0, some).to(state_dtype)
        if weight_decay:
            value.mul_(1 - lr * weight_decay)
        value.addcdiv_(mean, square.sqrt_().add_(eps), value=-step_size)
        if master is not None:
            master.index_copy_(0, some, value)
        if generator is not None:
            value = stochastic_round(value, param.dtype, generator)
        param.index_copy_(0, some, value.to(param.dtype))
