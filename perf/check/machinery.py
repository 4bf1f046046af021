"""Checks of what surrounds the kernels: same bits, compiled code, CUDA graphs, devices, streams."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pkm_triton as pkm
from pkm_triton.perf.measure.graphs import captured

from .outcome import FAIL, PASS, SKIP, Check, Outcome
from .setting import Setting

GROUP = "Machinery"
_OTHER_ORDER = 1e-5
"""What sums in another order may cost in float32, as a share of the largest element."""


def checks(setting: Setting) -> Iterator[Check]:
    """On a GPU all of them; elsewhere those that need none."""
    for name, run in {
        "the same bits twice": _same_bits,
        "compiled, without a break": _compiled,
        "a CUDA graph of inference": _graph_of_inference,
        "a CUDA graph of a training step, factored gradients": _graph_of_training,
        "another device than the current one": _other_device,
        "a stream of its own": _own_stream,
        "no wait for the device": _no_wait,
    }.items():
        yield Check(GROUP, name, functools.partial(run, setting))


def memory(
    setting: Setting, sparse_grad: Any = False, query_norm: Any = "layer"
) -> "pkm.ProductKeyMemory":
    """A layer in training mode, the same at every call."""
    sizes: dict[str, Any] = {"num_subkeys": 12, "heads": 2, "top_k": 4, "query_dim": 8}
    if not setting.small:
        sizes = {"num_subkeys": 256, "heads": 4, "top_k": 32, "query_dim": 128}
    torch.manual_seed(0)
    return pkm.ProductKeyMemory(
        _width(setting),
        **sizes,
        query_norm=query_norm,
        sparse_grad=sparse_grad,
        device=setting.device,
    )


def _width(setting: Setting) -> int:
    return 16 if setting.small else 512


def _input(setting: Setting, seed: int = 40) -> Tensor:
    return setting.randn(3 if setting.small else 1024, _width(setting), seed=seed)


def _tensors(layer: "pkm.ProductKeyMemory", x: Tensor) -> dict[str, Tensor]:
    """The output of a forward and the gradients of a backward pass, by name."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.square().mean().backward()
    found = {"output": out.detach(), "input": x.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: each.to_dense() for name, each in found.items() if each is not None}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Outcome:
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    if different:
        return Outcome(FAIL, note=f"other bits: {', '.join(different)}")
    return Outcome(PASS)


def _same_bits(setting: Setting) -> Outcome:
    """Twice, the second time beside other work on the device."""
    layer, x = memory(setting, True), _input(setting)
    first = _tensors(layer, x)
    if setting.device.type != "cuda":
        return _equal(first, _tensors(layer, x))
    other = torch.cuda.Stream(setting.device)
    noise = torch.randn(4096, 4096, device=setting.device)
    torch.cuda.synchronize(setting.device)
    for _ in range(3):
        with torch.cuda.stream(other):
            for _ in range(20):
                noise = (noise @ noise).clamp_(-1, 1)
        outcome = _equal(first, _tensors(layer, x))
        if outcome.status != PASS:
            return outcome
    torch.cuda.synchronize(setting.device)
    return Outcome(PASS)


def _compiled(setting: Setting) -> Outcome:
    layer, x = memory(setting, query_norm=None), _input(setting)
    # Multiples of powers of two, of which any product's sums are exact: so the compiled layer,
    # whose products may be other kernels, has the same queries and reads the same slots.
    with torch.no_grad():
        x.mul_(4).round_().div_(4)
        for parameter in layer.query_net.parameters():
            parameter.mul_(16).round_().div_(16)
    eager = _tensors(layer, x)
    backend = "inductor" if setting.device.type == "cuda" else "aot_eager"
    layer.compile(fullgraph=True, backend=backend)
    compiled = _tensors(layer, x)
    worst_error = 0.0
    for name, expected in eager.items():
        largest = expected.abs().max().item() or 1.0
        error = (compiled[name] - expected).abs().max().item() / largest
        if not error <= _OTHER_ORDER:
            return Outcome(FAIL, error, _OTHER_ORDER, f"{name}, compiled")
        worst_error = max(worst_error, error)
    return Outcome(PASS, worst_error, _OTHER_ORDER)


def _on_gpu(run: Callable[[Setting], Outcome]) -> Callable[[Setting], Outcome]:
    @functools.wraps(run)
    def run_or_skip(setting: Setting) -> Outcome:
        if setting.device.type != "cuda":
            return Outcome(SKIP, note="needs a GPU")
        return run(setting)

    return run_or_skip


@_on_gpu
def _graph_of_inference(setting: Setting) -> Outcome:
    layer, x = memory(setting).eval(), _input(setting)
    with torch.no_grad():
        graph, out = captured(lambda: layer(x))
        other = _input(setting, seed=41)
        x.copy_(other)
        graph.replay()
        return _equal({"output": out}, {"output": layer(other)})


@_on_gpu
def _graph_of_training(setting: Setting) -> Outcome:
    def make() -> tuple["pkm.ProductKeyMemory", Callable[[Tensor], None]]:
        layer = memory(setting, "factored")
        rest, values = pkm.param_groups(layer)
        optimisers = [
            torch.optim.Adam([rest], capturable=True),
            pkm.optim.SparseAdam([values], capturable=True),
        ]

        def step(x: Tensor) -> None:
            for optimiser in optimisers:
                optimiser.zero_grad()
            layer(x).square().mean().backward()
            for optimiser in optimisers:
                optimiser.step()

        return layer, step

    x = _input(setting)
    layer, step = make()
    graph, _ = captured(lambda: step(x))
    eager, eager_step = make()
    for _ in range(3):
        eager_step(x)
    for seed in (41, 42):
        x.copy_(_input(setting, seed=seed))
        graph.replay()
        eager_step(x)
    return _equal(dict(layer.named_parameters()), dict(eager.named_parameters()))


@_on_gpu
def _other_device(setting: Setting) -> Outcome:
    if torch.cuda.device_count() < 2:
        return Outcome(SKIP, note="needs two GPUs")
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    layer, x = memory(setting).to(other), _input(setting).to(other)
    # Both on the same GPU: another model of GPU may give other bits.
    with torch.cuda.device(other):
        expected = _tensors(layer, x)
    return _equal(expected, _tensors(layer, x))


@_on_gpu
def _own_stream(setting: Setting) -> Outcome:
    layer, x = memory(setting), _input(setting)
    expected = _tensors(layer, x)
    stream = torch.cuda.Stream(setting.device)
    # The layer was made on the stream before.
    stream.wait_stream(torch.cuda.current_stream(setting.device))
    with torch.cuda.stream(stream):
        # Work that is long in coming: a kernel on another stream would not wait for it.
        late = torch.zeros_like(x)
        noise = torch.randn(4096, 4096, device=setting.device)
        for _ in range(20):
            noise = noise @ noise
        late.copy_(x)
        found = _tensors(layer, late)
    stream.synchronize()
    return _equal(expected, found)


@_on_gpu
def _no_wait(setting: Setting) -> Outcome:
    """Forward, backward with dense and factored gradients, and the step of the latter."""
    for kind in (False, "factored"):
        layer, x = memory(setting, kind), _input(setting)
        optimiser = pkm.optim.SparseAdam([layer.values], capturable=True)

        def run(layer: "pkm.ProductKeyMemory" = layer, x: Tensor = x) -> None:
            layer(x).square().mean().backward()

        run()
        optimiser.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
            optimiser.step()
        except RuntimeError as error:
            return Outcome(FAIL, note=f"sparse_grad={kind}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Outcome(PASS)
