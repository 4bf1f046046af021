"""Norms of queries: padding left out, statistics over ranks, the same bits for any thread count."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.modes import transformed


def recomputing() -> bool:
    """Whether this forward pass is a repeated one, inside a backward pass (checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor, on every rank; differentiable."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _BatchNorm(torch.autograd.Function):
    """Batch norm of rows [T, features], float32 or float64, on a CPU.

    A few rows at a time, so that no temporary of the size of the rows is made: their page faults
    cost more than the arithmetic. The order of every sum is fixed.
    """

    ROWS = 64

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = rows.sum(0) / rows.shape[0]
        variance = _BatchNorm.products(rows, mean, None) / rows.shape[0]
        scale = (variance + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return torch.addcmul(shift, rows, scale), mean, variance

    @staticmethod
    def products(rows: Tensor, mean: Tensor, others: Tensor | None) -> Tensor:
        """The sums over rows of (rows - mean) · others, or of its square."""
        total = torch.zeros_like(mean)
        scratch = rows.new_empty(min(rows.shape[0], _BatchNorm.ROWS), rows.shape[1])
        for start in range(0, rows.shape[0], _BatchNorm.ROWS):
            part = rows[start : start + _BatchNorm.ROWS]
            product = torch.sub(part, mean, out=scratch[: part.shape[0]])
            if others is None:
                product.mul_(product)
            else:  # which may be a batch, where nothing else is
                product = product * others[start : start + part.shape[0]]
            total = total + product.sum(0)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, weight, bias, ctx.eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(rows, weight, bias, mean, variance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, mean, variance = ctx.saved_tensors
        grad = grads[0].contiguous()
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            wanted = [p for p in (rows, weight, bias) if p is not None and p.requires_grad]
            variance, mean = torch.var_mean(rows, 0, correction=0)
            out = (rows - mean) * (variance + ctx.eps).rsqrt()
            out = out if weight is None else torch.addcmul(bias, out, weight)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(
                next(found) if p is not None and p.requires_grad else None
                for p in (rows, weight, bias)
            ), None
        count = rows.shape[0]
        inverse = (variance + ctx.eps).rsqrt()
        grad_bias = grad.sum(0)
        products = _BatchNorm.products(rows, mean, grad)
        grad_weight = None if weight is None else products * inverse
        grad_rows = None
        if ctx.needs_input_grad[0]:
            scale = inverse if weight is None else inverse * weight
            slope = -scale * inverse.square() * products / count
            grad_rows = torch.addcmul(-scale * grad_bias / count - mean * slope, rows, slope)
            grad_rows.addcmul_(grad, scale)
        return grad_rows, grad_weight, None if bias is None else grad_bias, None


class QueryBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of queries [T, features], with the same parameters, buffers and arguments.

    It differs from torch's in five ways. Rows that a mask names as padding stay out of the
    statistics. With `synchronised` (see `synchronise_batch_norm`) the statistics are those of all
    ranks' rows together; then, in training, every rank must call it as often as the others, with
    any number of rows. A pass that checkpointing repeats does not enter the running statistics
    again. A single row in training, which has no variance, becomes the bias and leaves the running
    statistics as they are, with a mask or without. And on a CPU results and gradients do not
    depend on the number of threads, as torch's do.
    """

    synchronised: bool = False
    group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """`input` [T, features], normalised by the rows where mask [T] is True."""
        if not self.training and self.running_mean is not None:
            return self._by_running_statistics(input)
        together = (
            self.synchronised and dist.is_initialized() and dist.get_world_size(self.group) > 1
        )
        if together:
            if mask is None:
                mask = input.new_ones(input.shape[0], dtype=torch.bool)
            return self._by_masked_statistics(input, mask, together=True)
        if input.shape[0] == 0:
            return input
        if mask is not None:
            return self._by_masked_statistics(input, mask, together=False)
        if input.is_cuda and input.shape[0] > 1:
            return _uncounted(self, input) if recomputing() else super().forward(input)
        wide = _wide(input)
        if input.shape[0] == 1 or torch.compiler.is_compiling() or transformed():
            variance, mean = torch.var_mean(wide, 0, correction=0)
            out = self._scaled(wide - mean, variance, input.dtype)
        else:
            weight, bias = (
                (p.to(wide.dtype) if p is not None else None) for p in (self.weight, self.bias)
            )
            out, mean, variance = _BatchNorm.apply(wide, weight, bias, self.eps)
            out = out.to(input.dtype)
        if input.shape[0] > 1:
            self._count(mean, variance * (input.shape[0] / (input.shape[0] - 1)), 1)
        return out

    def _by_running_statistics(self, input: Tensor) -> Tensor:
        if input.is_cuda or input.shape[0] == 0:
            return super().forward(input) if input.shape[0] else input
        wide = _wide(input)
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        if mean.dtype != wide.dtype:
            mean, variance = mean.to(wide.dtype), variance.to(wide.dtype)
        # Torch's gradients of weight and bias depend on the number of threads.
        normal = torch.batch_norm(wide, None, None, mean, variance, False, 0.0, self.eps, False)
        return _affine(normal, self.weight, self.bias, input.dtype)

    def _by_masked_statistics(self, input: Tensor, mask: Tensor, *, together: bool) -> Tensor:
        """Of fixed shapes, and without a copy to the host."""
        padding = ~mask.unsqueeze(-1)
        wide = _wide(input).masked_fill(padding, 0)
        sums = torch.cat([wide.sum(0), mask.sum().to(wide).unsqueeze(0)])
        if together:
            sums = _SumOverRanks.apply(sums, self.group)
        count = sums[-1].detach()
        divisor = count.clamp(min=1)
        mean = sums[:-1] / divisor
        centred = (wide - mean).masked_fill(padding, 0)
        squares = centred.square().sum(0)
        if together:
            squares = _SumOverRanks.apply(squares, self.group)
        self._count(mean, squares / (count - 1).clamp(min=1), (count > 1).to(torch.int64))
        return self._scaled(centred, squares / divisor, input.dtype)

    def _count(self, mean: Tensor, unbiased: Tensor, seen: Tensor | int) -> None:
        """Let a batch enter the running statistics, or not where `seen` is 0."""
        if self.running_mean is None or recomputing():
            return
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(seen)
            share: Tensor | float | None = self.momentum
            if share is None:
                share = 1 / self.num_batches_tracked.clamp(min=1)
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                change = (new.to(running.dtype) - running) * share * seen
                running.add_(change)

    def _scaled(self, centred: Tensor, variance: Tensor, dtype: torch.dtype) -> Tensor:
        return _affine(centred * (variance + self.eps).rsqrt(), self.weight, self.bias, dtype)


class QueryLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` whose gradients on a CPU do not depend on the number of threads."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's."""
        if input.is_cuda or not self.elementwise_affine:
            return super().forward(input)
        normal = F.layer_norm(_wide(input), self.normalized_shape, None, None, self.eps)
        return _affine(normal, self.weight, self.bias, input.dtype)


def batch_norm(norm: nn.Module, rows: Tensor, mask: Tensor | None) -> Tensor:
    """`norm(rows)` of any batch norm, with statistics of the rows [T, features] of the mask [T]."""
    if isinstance(norm, QueryBatchNorm):
        return norm(rows, mask)
    if rows.shape[0] == 0:
        return rows
    picked = mask is not None and norm.training
    # Ranks of torch's own synchronised norm may hold different numbers of tokens; picking them
    # costs a wait for the device, which the exchange of statistics costs anyway.
    chosen = rows[mask] if picked else rows
    out = _uncounted(norm, chosen) if recomputing() else norm(chosen)
    if not picked:
        return out
    assert mask is not None
    return torch.zeros_like(rows).masked_scatter(mask.unsqueeze(-1), out)


def _uncounted(norm: nn.Module, rows: Tensor) -> Tensor:
    """`norm(rows)` that leaves the running statistics as they are."""
    copies = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    return torch.func.functional_call(norm, copies, (rows,))


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()


def _affine(
    normal: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if weight is not None and bias is not None and weight.dtype == normal.dtype:
        out = torch.addcmul(bias, normal, weight)
        return out if out.dtype == dtype else out.to(dtype)
    if weight is not None:
        normal = normal * weight
    if bias is not None:
        normal = normal + bias
    return normal.to(dtype)
