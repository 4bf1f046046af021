"""The passes of a point, ready to be run: a layer, its input, and each of its three parts."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pkm_triton as pkm
from pkm_triton._backend import triton_is_installed
from pkm_triton.distributed import shard_memory
from pkm_triton.gradients import FactoredGradient, local
from pkm_triton.perf.records.points import COMPILED, Point

from .baselines import PackageMemory, TextbookMemory
from .graphs import captured
from .reads import generate_slots


class OwnMemory(nn.Module):
    """A layer of pkm_triton, seen as three parts."""

    def __init__(self, layer: "pkm.ProductKeyMemory | pkm.FlatKeyMemory") -> None:
        super().__init__()
        self.layer = layer
        self.query_net = layer.query_net

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and slots [T, H, k] for queries [T, H, d_q]."""
        return self.layer.weigh(query)

    def gather(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Outputs [T, d_v] for slots and weights [T, H, k]."""
        layer = self.layer
        return pkm.gather_values(
            layer.values, slots.flatten(1), weights.flatten(1), sparse_grad=layer.sparse_grad
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer itself: x [T, dim] to [T, d_v]."""
        return self.layer(x)


Memory = OwnMemory | TextbookMemory | PackageMemory
"""All take x [T, dim]; all but `PackageMemory` can be taken apart: `query_net` from x to queries
[T, H, d_q], `lookup` from those to weights and slots [T, H, k], `gather` to outputs [T, d_v]."""


def build_memory(point: Point, device: str | None = None) -> Memory:
    """Make the layer of a point, on its device or another.

    Raises:
        ImportError: the point asks for `product-key-memory`, which is not installed.
    """
    norm: Any = None if point.query_norm == "none" else point.query_norm
    shared: dict[str, Any] = {
        "num_subkeys": point.num_subkeys,
        "heads": point.heads,
        "top_k": point.top_k,
        "query_dim": point.query_dim,
        "sparse_grad": "factored" if point.pass_name == "fused-step" else point.sparse_grad,
        "device": device or point.device,
        "dtype": point.torch_dtype,
    }
    if point.implementation == "product-key-memory":
        return PackageMemory(point.dim, **shared)
    if point.implementation == "textbook" or point.implementation in COMPILED:
        query_net = pkm.QueryNetwork(
            point.dim,
            point.heads,
            point.query_dim,
            norm,
            device=device or point.device,
            dtype=point.torch_dtype,
        )
        return TextbookMemory(query_net, point.value_dim, keys=point.keys, **shared)
    kind = pkm.ProductKeyMemory if point.keys == "product" else pkm.FlatKeyMemory
    return OwnMemory(kind(point.dim, point.value_dim, query_norm=norm, **shared))


def _spread(point: Point, mesh: Any) -> OwnMemory:
    """The layer of a point, its values over the ranks of a mesh; no rank ever has them whole."""
    memory = build_memory(point, "meta")
    assert isinstance(memory, OwnMemory)
    layout: Any = point.layout
    shard_memory(memory.layer, mesh, layout, equal_tokens=True)
    memory.to_empty(device=point.device)
    memory.layer.reset_parameters()
    return memory


def build_optimizers(point: Point, memory: Memory) -> list[torch.optim.Optimizer]:
    """One for the values, by the kind of their gradient, and Adam for the rest.

    Adam is the fused one: torch's default passes over the table once for each of its operations.
    """
    if isinstance(memory, OwnMemory):
        values: Tensor = memory.layer.values
        sparse: Any = pkm.optim.SparseAdam
    else:
        layer: Any = memory.layer if isinstance(memory, PackageMemory) else memory
        values, sparse = layer.values.weight, torch.optim.SparseAdam
    rest = [parameter for parameter in memory.parameters() if parameter is not values]
    adam = functools.partial(torch.optim.Adam, fused=True)
    return [sparse([values]) if point.sparse_grad else adam([values]), adam(rest)]


class Pass:
    """A function run once for its time: forward alone, or with backward, or with a step too.

    Args:
        function: what is run on `inputs`; returns one tensor.
        inputs: tensors of no graph; those of floating point get gradients in a backward pass.
        parameters: what else gets gradients.
        backward: whether to run the backward pass, from a gradient of ones.
        optimizers: what then makes a step.
        queued: whether a GPU is still busy when the pass is launched, so that launches are not in
            its time; else it is idle, as where a user calls and waits.
    """

    queued = False

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor] = (),
        *,
        backward: bool,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        queued: bool = False,
    ) -> None:
        self._optimizers = optimizers
        self.queued = queued
        self._function = function
        self._inputs = [
            tensor.detach().requires_grad_(backward and tensor.is_floating_point())
            for tensor in inputs
        ]
        self._leaves = [*self._inputs, *parameters]
        self._backward = backward
        self._grad_output: Tensor | None = None

    def run(self) -> None:
        """Run the pass once; the gradients stay on the leaves."""
        if not self._backward:
            with torch.no_grad():
                self._function(*self._inputs)
            return
        output = self._function(*self._inputs)
        if self._grad_output is None:
            self._grad_output = torch.ones_like(output)
        output.backward(self._grad_output)
        for optimizer in self._optimizers:
            optimizer.step()

    def captured(self) -> "Pass":
        """The same pass as a CUDA graph, which runs its kernels without launching each.

        Raises:
            RuntimeError: something in it waits for the device, or cannot be captured.
        """
        graph, _ = captured(self.run)

        def replay() -> Tensor:
            graph.replay()
            return self._inputs[0]

        return Pass(replay, [], backward=False, queued=True)

    def clear(self) -> None:
        """Forget the gradients; not part of the time."""
        for leaf in self._leaves:
            leaf.grad = None

    def gradients(self) -> Iterator[Tensor]:
        """The gradients the pass has left."""
        for leaf in self._leaves:
            grad = None if leaf.grad is None else local(leaf.grad)
            if isinstance(grad, FactoredGradient):
                for part in grad.reads:
                    yield from (part.slots, part.weights, part.grad_output)
            elif grad is not None:
                yield grad


@dataclass(frozen=True)
class Parts:
    """A pass for each part of a layer, and how many different slots the gather reads."""

    NAMES = ("query", "lookup", "gather")
    query: Pass
    lookup: Pass
    gather: Pass
    distinct_slots: int

    def passes(self) -> tuple[Pass, ...]:
        """The three of `NAMES`, in that order."""
        return (self.query, self.lookup, self.gather)


class Workload:
    """A built point: the whole pass, and the parts where the layer can be taken apart.

    Attributes:
        whole: the pass whose time is the row's.
        memory: the layer; over the ranks of `mesh`, if there is one, each with tokens of its own.
        parameter_bytes: parameters and buffers of the layer.
        first_call_s: time of the first pass, once `warm_up` was called; NaN before.
        compile_s: seconds of that in which Triton compiled, on a GPU; NaN elsewhere.
    """

    first_call_s = math.nan
    compile_s = math.nan

    def __init__(self, point: Point, *, seed: int = 0, mesh: Any = None) -> None:
        rank = 0 if mesh is None else mesh.get_local_rank()
        generator = torch.Generator().manual_seed(seed + rank)
        # The layers draw their parameters from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            memory = build_memory(point) if mesh is None else _spread(point, mesh)
        memory.train(point.backward)
        self._point = point
        self.memory = memory
        self._x = torch.randn(point.tokens, point.dim, generator=generator).to(
            device=point.device, dtype=point.torch_dtype
        )
        self._slots: Tensor | None = None
        if point.reads != "layer":
            shape = (point.tokens, point.heads, point.top_k)
            self._slots = generate_slots(
                point.reads, shape, point.num_slots, generator=generator, device=point.device
            )
        function = memory if self._slots is None else self._read_generated
        if point.implementation in COMPILED:
            # For these sizes: sizes left open would cost it speed.
            mode = COMPILED[point.implementation]
            function = torch.compile(function, mode=mode, dynamic=False)
        self.whole = Pass(
            function,
            [self._x],
            tuple(memory.parameters()),
            backward=point.backward,
            optimizers=build_optimizers(point, memory) if point.steps else (),
        )
        tensors = (*memory.parameters(), *memory.buffers())
        self.parameter_bytes = sum(local(tensor).nbytes for tensor in tensors)

    def warm_up(self) -> None:
        """Run the pass once, and remember how long that took: compiling is in no other time."""
        started = time.perf_counter()
        if self._point.device == "cuda" and triton_is_installed():
            from pkm_triton.kernels.launches import compile_seconds

            with compile_seconds() as compiled:
                self.whole.run()
            self.compile_s = sum(map(sum, compiled.values()), 0.0)
            torch.cuda.synchronize()
        else:
            self.whole.run()
        self.first_call_s = time.perf_counter() - started
        self.whole.clear()

    def _read_generated(self, x: Tensor) -> Tensor:
        memory = self.memory
        assert not isinstance(memory, PackageMemory)
        assert self._slots is not None
        weights, _ = memory.lookup(memory.query_net(x))
        return memory.gather(self._slots, weights)

    def parts(self) -> Parts | None:
        """The three parts, fed with what the layer makes; None for a layer without parts."""
        memory = self.memory
        if isinstance(memory, PackageMemory) or self._point.implementation in COMPILED:
            return None
        with torch.no_grad():
            query = memory.query_net(self._x)
            weights, slots = memory.lookup(query)
        slots = slots if self._slots is None else self._slots
        leaves = tuple(memory.parameters())
        backward = self._point.backward
        return Parts(
            query=Pass(memory.query_net, [self._x], leaves, backward=backward),
            lookup=Pass(lambda q: memory.lookup(q)[0], [query], leaves, backward=backward),
            gather=Pass(memory.gather, [slots, weights], leaves, backward=backward),
            distinct_slots=slots.unique().numel(),
        )
