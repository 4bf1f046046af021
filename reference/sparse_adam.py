"""Adam on the rows that were read: one step over a table's touched rows, in place.

Shapes: K slots, M touched rows.
    param, exp_avg, exp_avg_sq, master [K, d_v]; rows [M]; grad_rows [M, d_v]
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .rounding import generator_of
from .row_update import RowUpdate, Rule


@dataclass(frozen=True)
class AdamOptions:
    """The options of a step.

    Attributes:
        lr: learning rate; a number, or a tensor of one element.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled: a touched row first shrinks by the factor 1 - lr · weight_decay.
        step: how many steps have been made, this one included; a number, or a tensor of one
            element.
        maximize: go up the gradient.
        stochastic_rounding: round a bfloat16 or float16 `param` up or down at random, unbiased.
        seed: of that rounding; same seed, step and inputs, same bits.
        master: [K, d_v], float32, the values that `param` is rounded from; updated in place.
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


def adam_rule(options: AdamOptions, device: torch.device) -> Rule:
    """The step on rows in full precision."""
    decay = 1 - options.lr * options.weight_decay if options.weight_decay else None
    step = options.step
    number = step.to(torch.float64) if isinstance(step, Tensor) else step
    size = options.lr * (1 - options.beta2**number) ** 0.5 / (1 - options.beta1**number)
    if isinstance(size, Tensor):
        size = float(size) if device.type == "cpu" else size.to(torch.float32)
    # torch adds eps to the root of the corrected second moment, SparseAdam to that of the plain
    # one: so the correction goes into the learning rate, and to the operator the number of steps
    # is infinite.
    steps = torch.full((), math.inf, dtype=torch.float32, device=device)

    def rule(value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor) -> None:
        if decay is not None:
            value.mul_(decay)
        torch.ops.aten._fused_adamw_(
            [value], [gradient], [mean], [square], [], [steps], lr=size, beta1=options.beta1,
            beta2=options.beta2, weight_decay=0.0, eps=options.eps, amsgrad=False,
            maximize=options.maximize,
        )  # fmt: skip

    return rule


def adam_on_rows(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, num_rows: int, options: AdamOptions
) -> RowUpdate:
    """What makes the step on some rows at a time, `num_rows` in all."""
    generator = None
    if options.stochastic_rounding:
        generator = generator_of(param.device, options.seed, int(options.step))
    rule = adam_rule(options, param.device)
    return RowUpdate(param, (exp_avg, exp_avg_sq), rule, num_rows, options.master, generator)


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    **options: Any,
) -> None:
    """One step of Adam on some rows of a table, as `torch.optim.SparseAdam` does it.

    Args:
        param: [K, d_v], updated in place.
        exp_avg: [K, d_v], float32 (float64 for float64), updated in place.
        exp_avg_sq: likewise.
        rows: [M], int64, each once; None: all rows, in order.
        grad_rows: [M, d_v], their gradient.
        **options: see `AdamOptions`.
    """
    chosen, master = AdamOptions(**options), options.get("master")
    if rows is None:
        # Rows of one element, so that pieces are small however wide a row is.
        param, exp_avg, exp_avg_sq, grad_rows = (
            table.view(-1, 1) for table in (param, exp_avg, exp_avg_sq, grad_rows)
        )
        chosen = replace(chosen, master=None if master is None else master.view(-1, 1))
    num_rows = grad_rows.shape[0]
    update = adam_on_rows(param, exp_avg, exp_avg_sq, num_rows, chosen)
    for start in range(0, num_rows, max(1, update.count)):
        piece = slice(start, start + update.count)
        update(piece if rows is None else rows[piece], grad_rows[piece])
