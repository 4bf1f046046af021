"""Optimisation with sparse gradients: Adam on the rows that were read, and gradient clipping."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._optimizer_options import (
    Rounding,
    check_betas,
    check_flag,
    check_learning_rate,
    check_number,
)
from ._row_optimizer import RowOptimizer, RowStep
from .clipping import clip_grad_norm_
from .gradients import Reads

__all__ = ["SparseAdam", "clip_grad_norm_"]


class SparseAdam(RowOptimizer):
    """Adam on the rows that were read: a drop-in for `torch.optim.SparseAdam`.

    The moments and the values of a row change only in steps in which its gradient is there, in one
    pass over those rows. Beyond torch's it takes dense gradients too (a step of Adam on every
    row), decays weights, keeps the moments of half-precision parameters in float32, and does not
    lose their small updates to rounding. From a gradient that is kept as its factors
    (`sparse_grad="factored"`) it makes the step row by row, as the rows' gradient is made, which is
    never stored. Of a DTensor, as FSDP2 has them, each rank steps its shard.

    Args:
        params: parameters or parameter groups, see `param_groups`; each group may set all options
            below.
        lr: learning rate, 0 or more; a number or a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        maximize: go up the gradient.
        weight_decay: decoupled, on touched rows only: a row shrinks by 1 - lr · weight_decay.
        rounding: how bfloat16 and float16 parameters take an update: "stochastic" rounds up or
            down at random so that updates too small to see add up all the same; "master" keeps a
            float32 copy; "nearest" is torch's, which loses such updates. Float32 is not rounded.
        seed: of stochastic rounding, an integer of at least 0. Same seed, gradients and start, same
            bits; each parameter, and each shard of one, draws random numbers of its own, by its
            place among all.
        capturable: count steps on the parameters' device, so that a step of dense gradients, or of
            those kept as factors, can be captured in a CUDA graph.

    Raises:
        TypeError: if a parameter is sparse or not floating, or an option is of the wrong kind.
        ValueError: if an option is out of range.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "weight_decay": weight_decay,
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def check_options(self, options: dict[str, Any]) -> None:
        """See the class."""
        check_learning_rate(options["lr"])
        check_betas(options["betas"])
        check_number("eps", options["eps"], above=0)
        check_flag("maximize", options["maximize"])
        check_number("weight_decay", options["weight_decay"])

    def update_rows(self, step: RowStep, rows: Tensor | None, grad_rows: Tensor) -> None:
        """Adam on rows whose gradient is there."""
        tables = step.table, *step.states.values()
        step.functions.sparse_adam(*tables, rows, grad_rows, **_options(step))

    def update_reads(self, step: RowStep, reads: Reads) -> None:
        """Adam on rows as their gradient is made."""
        tables = step.table, *step.states.values()
        read = reads.grad_output, reads.slots, reads.weights
        step.functions.scatter_adam(*tables, *read, **_options(step))


def _options(step: RowStep) -> dict[str, Any]:
    beta1, beta2 = step.group["betas"]
    options = {name: step.group[name] for name in ("lr", "eps", "weight_decay", "maximize")}
    return {**options, "beta1": beta1, "beta2": beta2, "step": step.step, **step.rounding}
