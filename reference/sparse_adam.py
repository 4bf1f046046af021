"""Adam on the rows that were read: one step over a table's touched rows, in place.

Shapes: K slots, M touched rows.
    param, exp_avg, exp_avg_sq, master [K, d_v]; rows [M]; grad_rows [M, d_v]
"""

import math

import torch
from torch import Tensor

# Rows are taken so many elements at a time, so that the buffers they are gathered into stay in
# cache: measured best of 2^15 to 2^19 over 100,000 rows of 512. A constant, because stochastic
# rounding draws piece by piece.
ELEMENTS_AT_A_TIME = 1 << 17
# Elements that vector instructions take at once, at most: what is left over at an end is computed
# by others, which round otherwise.
VECTOR = 16


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


def _words(table: Tensor) -> Tensor:
    """A view of a table in the widest elements its rows divide into, for copying them.

    `index_copy_` moves element by element: 16 bytes at a time take half the time of 4.
    """
    for dtype in (torch.complex128, torch.float64):
        size = dtype.itemsize
        row, offset = table.shape[1], table.storage_offset()
        if row * table.itemsize % size == 0 and offset * table.itemsize % size == 0:
            return table.view(dtype)
    return table


class RowUpdate:
    """Adam on some rows of a table at a time, in place; the options are those of `sparse_adam`.

    The rows are gathered into buffers, updated there in one pass, and put back.
    """

    def __init__(
        self,
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
    ) -> None:
        self.tables = [param if master is None else master, exp_avg, exp_avg_sq]
        self.param = param
        width, dtype = param.shape[1], exp_avg.dtype
        # A multiple of VECTOR, so that only the last piece has an end that is no whole vector.
        self.count = max(1, ELEMENTS_AT_A_TIME // max(1, VECTOR * width)) * VECTOR
        self._buffers = [exp_avg.new_zeros(self.count * width) for _ in range(4)]
        self._whole_piece = self._views(self.count)
        self._words = [_words(table) for table in self.tables]
        self._copies = param.dtype != dtype
        self._decay = 1 - lr * weight_decay if weight_decay else None
        number = step.to(torch.float64) if isinstance(step, Tensor) else step
        size: float | Tensor = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
        if isinstance(size, Tensor):
            size = float(size) if param.device.type == "cpu" else size.to(torch.float32)
        # torch adds eps to the root of the corrected second moment, SparseAdam to that of the
        # plain one: so the correction goes into the learning rate, and to the operator the number
        # of steps is infinite.
        self._steps = torch.full((), math.inf, device=param.device)
        self._options = {
            "lr": size,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": 0.0,
            "eps": eps,
            "amsgrad": False,
            "maximize": maximize,
        }
        self._generator = None
        if stochastic_rounding and self._copies:
            # Of a seed the CPU's generator takes 32 bits.
            mixed = (seed * 2654435761 + int(step)) % 2**32
            self._generator = torch.Generator(param.device).manual_seed(mixed)

    def _views(self, num_rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """The buffers for so many rows, in whole vectors and as the tables' rows.

        They are of values, first and second moments, and gradient. What lies behind the rows in a
        vector is computed and forgotten.
        """
        width = self.param.shape[1]
        size = num_rows * width
        padded = min(-(-size // VECTOR) * VECTOR, self._buffers[0].numel())
        vectors = [buffer[:padded] for buffer in self._buffers]
        return vectors, [buffer[:size].view(num_rows, width) for buffer in self._buffers]

    def __call__(self, rows: Tensor, grad: Tensor) -> None:
        """Update at most `count` rows, [M], by their gradients, [M, d_v]."""
        whole = rows.shape[0] == self.count
        vectors, buffers = self._whole_piece if whole else self._views(rows.shape[0])
        value, mean, square, gradient = vectors
        self._gather(rows, buffers)
        if grad.dtype == mean.dtype and grad.numel() == mean.numel() and grad.is_contiguous():
            gradient = grad.view(-1)
        else:
            buffers[3].copy_(grad)
        if self._decay is not None:
            value.mul_(self._decay)
        torch.ops.aten._fused_adamw_(
            [value], [gradient], [mean], [square], [], [self._steps], **self._options
        )
        self._put_back(rows, buffers)

    def _gather(self, rows: Tensor, buffers: list[Tensor]) -> None:
        for table, buffer in zip(self.tables, buffers[:3], strict=True):
            if table.dtype == buffer.dtype:
                torch.index_select(table, 0, rows, out=buffer)
            else:
                buffer.copy_(table.index_select(0, rows))

    def _put_back(self, rows: Tensor, buffers: list[Tensor]) -> None:
        for table, words, buffer in zip(self.tables, self._words, buffers[:3], strict=True):
            if table.dtype == buffer.dtype:
                words.index_copy_(0, rows, buffer.view(words.dtype))
        if self._copies:
            value = buffers[0]
            if self._generator is not None:
                value = stochastic_round(value, self.param.dtype, self._generator)
            self.param.index_copy_(0, rows, value.to(self.param.dtype))


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
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
) -> None:
    """One step of Adam on some rows of a table, as `torch.optim.SparseAdam` does it.

    Args:
        param: [K, d_v], updated in place.
        exp_avg: [K, d_v], float32 (float64 for float64), updated in place.
        exp_avg_sq: likewise.
        rows: [M], int64, each once.
        grad_rows: [M, d_v], their gradient.
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
    update = RowUpdate(
        param, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, step=step, maximize=maximize,
        stochastic_rounding=stochastic_rounding, seed=seed, master=master,
    )  # fmt: skip
    for start in range(0, grad_rows.shape[0], update.count):
        piece = slice(start, start + update.count)
        update(rows[piece], grad_rows[piece])
