"""Compile the kernels that memory layers need ahead of time, several at once."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._backend import implementation
from ._checks import SparseGrad, check_integer
from ._devices import OnDevice, made_current
from ._row_optimizer import RowOptimizer, RowStep
from .experts import ProductKeyExperts
from .gradients import Reads, local
from .memory import FlatKeyMemory, ProductKeyMemory

Memory = ProductKeyMemory | FlatKeyMemory
_SEED = 2**62  # as wide as the seeds that an optimiser draws


def warm_up(
    module: nn.Module,
    tokens: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    threads: int | None = None,
) -> dict[str, list[float]]:
    """Compile the kernels of a forward pass, and in training mode of a backward pass and a step.

    Nothing is run and nothing is changed: launches are worked out from sizes and dtypes, and
    compiled several at once. Without it each kernel is compiled when it is first launched, one
    after the other. Call it under the `torch.autocast` that the passes run under, while no other
    thread launches kernels. Where the reference runs (on a CPU), and for float64, there is nothing
    to compile. Of values of `shard_memory` each rank compiles for its own part, and for equally
    many tokens on all ranks.

    Args:
        module: a memory layer, or a model with some; on its device.
        tokens: tokens of a call, batch · length; kernels for few tokens differ from those for many.
        optimizer: makes the steps; of it only `pkm.optim`'s have kernels of this library.
        threads: that compile at once; by default as many as the process has cores.

    Returns:
        For each kernel that was compiled the seconds of each compilation; empty where Triton's
        cache had all of them, and where there is nothing to compile.

    Raises:
        TypeError: if module is no module, optimizer no optimiser, or a number no integer.
        ValueError: if tokens or threads is below 1, or there is no memory in the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a module, not {type(module).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be an optimiser or None, not {type(optimizer).__name__}")
    check_integer("tokens", tokens, 1)
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    check_integer("threads", threads, 1)
    layers = [
        each for each in module.modules() if isinstance(each, (ProductKeyMemory, FlatKeyMemory))
    ]
    if not layers:
        raise ValueError(f"module is {type(module).__name__}, but must have a memory layer in it")
    found: dict[str, list[float]] = {}
    for device in dict.fromkeys(layer.values.device for layer in layers):
        some = [layer for layer in layers if layer.values.device == device]
        for kernel, seconds in _warm_up_on(device, some, tokens, optimizer, threads).items():
            found.setdefault(kernel, []).extend(seconds)
    return found


def _warm_up_on(
    device: torch.device,
    layers: list[Memory],
    tokens: int,
    optimizer: torch.optim.Optimizer | None,
    threads: int,
) -> dict[str, list[float]]:
    compiled = [layer for layer in layers if _runs_kernels(layer)]
    if not compiled:
        return {}
    from .kernels.launches import compile_launches

    launches = launches_of(compiled, tokens, optimizer)
    with made_current(device):
        return compile_launches(launches, threads)


def _runs_kernels(layer: Memory) -> bool:
    if not isinstance(implementation(getattr(layer, layer.keys_name)), OnDevice):
        return False
    from triton import knobs

    return not knobs.runtime.interpret


def launches_of(
    layers: list[Memory], tokens: int, optimizer: torch.optim.Optimizer | None
) -> list[Any]:
    """What kernels would be launched with, on tensors without data; all layers on one device."""
    from . import kernels
    from .kernels.chip import as_if, chip_of
    from .kernels.launches import recorded_launches

    with as_if(chip_of(layers[0].values.device)), recorded_launches() as launches:
        for layer in layers:
            passes = _Passes(kernels, layer, tokens)
            passes.run()
            if layer.training and isinstance(optimizer, RowOptimizer):
                for reading in passes.readings:
                    _step(kernels, reading, optimizer)
    return launches


@dataclass(frozen=True)
class _Reading:
    """Reads of a table, on tensors without data.

    Attributes:
        parameter: the table, of which this rank may have a part.
        form: of the table's gradient; None where it needs none.
        reads: slots, weights, and the gradient of the output, or the tokens that are multiplied.
    """

    parameter: Tensor
    form: SparseGrad | None
    reads: Reads

    @property
    def table(self) -> Tensor:
        """The part of this rank."""
        return _meta(local(self.parameter))


def _readings(layer: Memory, tokens: int) -> list[_Reading]:
    """The gathers of a layer: one, but for slots that train beside the others."""
    values, tuned = layer.values, layer.tuned
    if layer.sharding is not None:
        # A rank gathers its part for the tokens of all.
        tokens *= layer.sharding.ranks
    shape = (tokens, layer.heads * layer.top_k)
    slots = torch.empty(shape, dtype=torch.int32, device="meta")
    weights = torch.empty(shape, device="meta")

    def reading(table: Tensor, form: SparseGrad, dtype: torch.dtype) -> _Reading:
        out = torch.empty(tokens, local(table).shape[1], dtype=dtype, device="meta")
        trains = form if table.requires_grad else None
        return _Reading(table, trains, Reads(slots, weights, out))

    if tuned is None:
        return [reading(values, layer.sparse_grad, values.dtype)]
    # Their sums are added before they are rounded.
    wide = torch.promote_types(torch.float32, values.dtype)
    return [reading(values, False, wide), reading(tuned.values, False, wide)]


class _Passes:
    """The passes of a layer, on tensors without data."""

    def __init__(self, functions: Any, layer: Memory, tokens: int) -> None:
        self._functions, self._layer, self._tokens = functions, layer, tokens
        self.readings = _readings(layer, tokens)
        self._reads = (tokens, layer.heads * layer.top_k)
        self._slots = torch.empty(self._reads, dtype=torch.int32, device="meta")
        self._weights = torch.empty(self._reads, device="meta")
        # Dtypes are asked for, of the real modules and under whatever autocast is in force.
        keys = getattr(layer, layer.keys_name)
        x = keys.new_empty(2, layer.dim, dtype=_input_dtype(layer))
        with torch.no_grad():
            query = copy.deepcopy(layer.query_net).eval()(x.zero_())
            some_keys = keys[..., :1, :]
            if layer.key_norm is not None:
                some_keys = layer.key_norm(some_keys)
        self._query = _like(query, (tokens, layer.heads, layer.query_dim))
        self._keys = _like(some_keys, keys.shape)
        self._x = _like(x, (tokens, layer.dim))

    def run(self) -> None:
        layer, run = self._layer, self._functions
        product = isinstance(layer, ProductKeyMemory)
        name = "product_key_topk" if product else "flat_key_topk"
        getattr(run, name)(self._query, self._keys, layer.top_k)
        if layer.training:
            scores = self._weights.view(self._tokens, layer.heads, layer.top_k)
            slots = self._slots.view(scores.shape)
            getattr(run, f"{name}_backward")(scores, self._query, self._keys, slots)
        if isinstance(layer, ProductKeyExperts):
            run.sample_values(_meta(layer.inputs), self._slots, self._x)
        for reading in self.readings:
            self._gather(reading)
        if isinstance(layer, ProductKeyExperts):
            form = layer.sparse_grad if layer.inputs.requires_grad else None
            reads = Reads(self._slots, self._weights, self._x)
            inputs = _Reading(layer.inputs, form, reads)
            self.readings.append(inputs)
            if layer.training:
                self._sample_backward(inputs)

    def _gather(self, reading: _Reading) -> None:
        layer, run = self._layer, self._functions
        reads, table = reading.reads, reading.table
        out = reads.grad_output
        run.gather_values(table, reads.slots, reads.weights, out.dtype)
        gated = layer.output is not None and layer.output.gate_proj is not None
        whole = layer.tuned is None and layer.sharding is None
        if gated and whole and not layer.training and self._x.dtype == out.dtype:
            run.gather_values(table, reads.slots, reads.weights, gate=out)
        if not layer.training:
            return
        inputs = out, table, reads.slots, reads.weights
        if reading.form is True:
            run.gather_values_backward_sparse(*inputs, True)
        else:
            run.gather_values_backward(*inputs, reading.form is False, True)

    def _sample_backward(self, reading: _Reading) -> None:
        run, table = self._functions, reading.table
        reads = reading.reads
        run.gather_values(table, reads.slots, reads.weights)
        sums = reads.slots, reads.weights, reads.grad_output, table.shape[0], table.dtype
        if reading.form is True:
            run.scatter_values_sparse(*sums)
        elif reading.form is False:
            run.scatter_values(*sums)


def _input_dtype(layer: Memory) -> torch.dtype:
    device = layer.values.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next(layer.query_net.parameters()).dtype


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _meta(tensor: Tensor) -> Tensor:
    return _like(tensor, tuple(tensor.shape))


def _step(functions: Any, reading: _Reading, optimizer: RowOptimizer) -> None:
    """The step of a table, where it is among the optimiser's parameters."""
    table = reading.table
    for group in optimizer.param_groups:
        if reading.form is None or all(reading.parameter is not each for each in group["params"]):
            continue
        step = _row_step(functions, table, optimizer, group)
        if reading.form == "factored":
            slots, weights = reading.reads.slots, reading.reads.weights
            grad = _like(table, (slots.shape[0], table.shape[1]))
            optimizer.update_reads(step, Reads(slots, weights, grad))
        elif reading.form:
            rows = torch.empty(1, dtype=torch.int64, device="meta")
            optimizer.update_rows(step, rows, _like(table, (1, table.shape[1])))
        else:
            optimizer.update_rows(step, None, _meta(table))


def _row_step(
    functions: Any, table: Tensor, optimizer: RowOptimizer, group: dict[str, Any]
) -> RowStep:
    half = table.dtype in (torch.bfloat16, torch.float16)
    kept = torch.float32 if half else table.dtype
    states: dict[str, Tensor] = {}
    for name in optimizer.state_names:
        shape = optimizer.state_shape(name, table)
        states[name] = torch.empty(shape, dtype=kept, device="meta").view(table.shape[0], -1)
    rounding: dict[str, Any] = {}
    if half:
        master = group["rounding"] == "master"
        rounding = {
            "stochastic_rounding": group["rounding"] == "stochastic",
            "seed": _SEED,
            "master": torch.empty(table.shape, device="meta") if master else None,
        }
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = lr.detach().to("meta")
    number = torch.empty((), device="meta") if group["capturable"] else 1
    return RowStep(functions, _meta(table), states, number, rounding, {**group, "lr": lr})
