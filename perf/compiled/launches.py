"""Launches of kernels, recorded instead of run, and compiled for GPUs that need not be there."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .machine_code import describe_amd, describe_nvidia, offset_widths

FILES = (
    "gather_values", "product_key_topk", "flat_key_topk", "scatter_values", "sample_values",
    "scatter_adam", "sparse_adam",
)  # fmt: skip


def shipped_configurations() -> dict[str, Any]:
    """The calls of all kernel files, by the configuration's name."""
    calls: dict[str, Any] = {}
    for file in FILES:
        module = importlib.import_module(f"pkm_triton.kernels.{file}")
        calls |= module.shipped_configurations()
    return calls


def compile_configuration(job: tuple[str, str, bool]) -> list[dict[str, Any]]:
    """The rows of a shipped configuration, by its name, for an architecture and an alignment."""
    from pkm_triton.kernels.chip import CHIPS, as_if
    from pkm_triton.kernels.launches import recorded_launches

    name, architecture, aligned = job
    with as_if(CHIPS[architecture]), recorded_launches() as launches:
        shipped_configurations()[name]()
    # What is launched again and again is compiled once.
    distinct = {compiled_for(*launch): launch for launch in reversed(launches)}
    return [
        {"configuration": name, **compile_launch(*launch, architecture, aligned)}
        for launch in reversed(distinct.values())
    ]


def compiled_for(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What tells one compilation of a kernel from another."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    runtime = [each.name for each in kernel.params if not each.is_constexpr]
    kinds = tuple(_kind(bound[name]) for name in runtime)
    constants = sorted((key, str(value)) for key, value in bound.items() if key not in runtime)
    return kernel.__name__, kinds, tuple(constants)


def _kind(value: Any) -> str:
    """The dtype of a tensor, the type of a number, and whether an integer is above 32 bits."""
    wide = isinstance(value, int) and not -(2**31) <= value < 2**31
    return str(getattr(value, "dtype", type(value))) + ("64" if wide else "")


def cpu_seconds() -> float:
    """CPU seconds of this process and of those it waited for, the assembler among them."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: str, aligned: bool
) -> dict[str, Any]:
    """Compile a recorded launch for an architecture, and describe the outcome."""
    import torch
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import mangle_type

    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {each.name: bound[each.name] for each in kernel.params if each.is_constexpr}
    options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants or bound[argument] is None:
            constants.setdefault(argument, None)
            signature[argument] = "constexpr"
            continue
        signature[argument] = mangle_type(bound[argument])
        if isinstance(bound[argument], torch.Tensor) and aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    if architecture.startswith("gfx"):
        # CDNA runs waves of 64, RDNA of 32.
        target = GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    unknown = options.keys() - vars(make_backend(target).parse_options(dict(options))).keys()
    if unknown:  # launched, Triton would raise; compiled ahead of time, it says nothing
        raise KeyError(f"{kernel.__name__}: {architecture} has no option {', '.join(unknown)}")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    before = cpu_seconds()
    with _driver_of(target), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=target, options=options)
    spent = cpu_seconds() - before
    row = {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "aligned": aligned,
        "shared": compiled.metadata.shared,
        "cpu_seconds": round(spent, 1),
        "offsets": offset_widths(compiled.asm["ttir"]),
    }
    describe = describe_amd if architecture.startswith("gfx") else describe_nvidia
    return row | describe(compiled, architecture)


@contextmanager
def _driver_of(target: Any) -> Iterator[None]:
    """Have kernels that ask what they are compiled for be told, whatever there is to run them."""
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> Any:
            return target

    chosen: Any = driver
    chosen.set_active(Driver())
    try:
        yield
    finally:
        # Chosen when next asked for; `reset_active` would choose now, and there may be none.
        chosen.set_active(None)
