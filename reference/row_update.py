"""Steps of an optimiser on some rows of a table, in place, a few rows at a time.

Shapes: K slots, M touched rows.
    param, master [K, d]; states [K, s] each, s being d or what the optimiser keeps of a row
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .rounding import HALF, round_stochastically

# Rows are taken so many elements at a time, so that the buffers they are gathered into stay in
# cache: measured best of 2^15 to 2^19 over 100,000 rows of 512. A constant, because stochastic
# rounding draws piece by piece.
ELEMENTS_AT_A_TIME = 1 << 17
# Elements that vector instructions take at once, at most: what is left over at an end is computed
# by others, which round otherwise.
VECTOR = 16

Rule = Callable[..., None]
"""rule(value, gradient, *states): the step, in place, on rows [M, d], [M, d] and [M, s] each."""


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
    """An optimiser's rule on some rows at a time.

    The rows are gathered into buffers in the states' precision, updated there, and put back; a
    half-precision `param` takes them rounded.

    Args:
        param: [K, d], updated in place.
        states: [K, s] each, float32 (float64 for a float64 `param`); updated in place.
        rule: the step on rows that are there in full precision.
        num_rows: how many rows there will be, all calls together.
        master: [K, d], float32, the values that `param` is rounded from; updated in place.
        generator: of stochastic rounding; None rounds to nearest.
    """

    def __init__(
        self,
        param: Tensor,
        states: Sequence[Tensor],
        rule: Rule,
        num_rows: int,
        master: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self._param, self._rule, self._generator = param, rule, generator
        self._tables = [param if master is None else master, *states]
        width = max(1, param.shape[1])
        # Rows that fill whole vectors. A piece is of whole vectors too; what lies behind the last
        # rows is computed and forgotten.
        self._whole = VECTOR // math.gcd(width, VECTOR)
        piece = max(1, ELEMENTS_AT_A_TIME // (self._whole * width)) * self._whole
        self.count = min(piece, -(-num_rows // self._whole) * self._whole)
        widths = [table.shape[1] for table in (*self._tables, param)]
        self._buffers = [states[0].new_zeros(self.count, each) for each in widths]
        self._words = [_words(table) for table in self._tables]
        self._rounds = param.dtype != states[0].dtype

    def __call__(self, rows: Tensor | slice, grad: Tensor) -> None:
        """Update at most `count` rows, [M] or a slice, by their gradients, [M, d]."""
        num_rows = grad.shape[0]
        padded = -(-num_rows // self._whole) * self._whole
        *buffers, gradient = (buffer[:padded] for buffer in self._buffers)
        if num_rows == padded and grad.dtype == gradient.dtype and grad.is_contiguous():
            gradient = grad
        else:
            gradient[:num_rows].copy_(grad)
        if isinstance(rows, slice) and num_rows == padded and not self._rounds:
            value, *states = (table[rows] for table in self._tables)
            self._rule(value, gradient, *states)
            # torch's fused operators do not tell autograd that they write.
            written = [x for x in (value, *states) if not x.is_inference()]
            torch.autograd.graph.increment_version(written)
            return
        self._gather(rows, [buffer[:num_rows] for buffer in buffers])
        self._rule(buffers[0], gradient, *buffers[1:])
        self._put_back(rows, [buffer[:num_rows] for buffer in buffers])

    def _gather(self, rows: Tensor | slice, buffers: list[Tensor]) -> None:
        for table, buffer in zip(self._tables, buffers, strict=True):
            if isinstance(rows, Tensor) and table.dtype == buffer.dtype:
                torch.index_select(table, 0, rows, out=buffer)
            else:
                buffer.copy_(table[rows])

    def _put_back(self, rows: Tensor | slice, buffers: list[Tensor]) -> None:
        for table, words, buffer in zip(self._tables, self._words, buffers, strict=True):
            if table.dtype == buffer.dtype:
                _set_rows(words, rows, buffer.view(words.dtype))
        if self._rounds:
            value = buffers[0]
            if self._generator is not None and self._param.dtype in HALF:
                value = round_stochastically(value, self._param.dtype, self._generator)
            _set_rows(self._param, rows, value.to(self._param.dtype))


def _set_rows(table: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        table[rows].copy_(values)
    else:
        table.index_copy_(0, rows, values)
