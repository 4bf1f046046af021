"""What the compiler makes of the kernels, for several GPUs and without any of them.

Each kernel file names its shipped configurations as calls of its launcher on tensors without data.
The launches are recorded instead of run, and compiled ahead of time: the report cannot disagree
with what a GPU would be given.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pkm_triton.perf.records.files import ensure_writable, write_whole

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
FILES = (
    "gather_values", "product_key_topk", "flat_key_topk", "scatter_values", "sample_values",
    "scatter_adam", "product_key_topk_backward", "sparse_adam",
)  # fmt: skip
# Registers, shared memory and warps of a multiprocessor, and its blocks (CUDA C++ Programming
# Guide, technical specifications by compute capability).
LIMITS = {
    "sm_80": (65536, 164 << 10, 64, 32),
    "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32),
}
# Multiprocessors of a chip of each architecture, and the shared bytes a program may have.
CHIPS = {
    "sm_80": (108, 163 << 10),
    "sm_90": (132, 227 << 10),
    "sm_100": (148, 227 << 10),
    "gfx942": (304, 64 << 10),
}
COLUMNS = (
    "configuration", "kernel", "architecture", "aligned", "registers", "spilled", "shared",
    "occupancy", "load", "store", "atomics", "barriers", "instructions", "offsets",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `pkm-perf kernels`."""
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--unaligned", action="store_true", help="also pointers of no alignment")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--processes", type=int, default=2)


def run(args: argparse.Namespace) -> int:
    """Print the table of `pkm-perf kernels`, and write it if asked to."""
    if args.json:
        ensure_writable(args.json.absolute().parent, "json")
    rows = report(args.architectures, args.only, args.unaligned, args.processes)
    print(" | ".join(COLUMNS))
    for row in rows:
        print(" | ".join(str(row[column]) for column in COLUMNS))
    if args.json:
        write_whole(args.json, json.dumps(rows, indent=1) + "\n")
    return 0


def report(
    architectures: Any = ARCHITECTURES, only: str = "", unaligned: bool = False, processes: int = 2
) -> list[dict[str, Any]]:
    """A row for each kernel, shipped configuration and architecture.

    Args:
        architectures: of ARCHITECTURES.
        only: what the configurations' names hold; all do where it is empty.
        unaligned: whether to compile for pointers of no alignment, too.
        processes: that compile at once.

    Raises:
        ValueError: no configuration's name holds `only`, or `processes` is not positive.
    """
    if processes < 1:
        raise ValueError(f"processes: {processes} is too small; at least 1 is needed")
    names = list(shipped_configurations())
    chosen = [name for name in names if only in name]
    if not chosen:
        raise ValueError(
            f"only: {only!r} is in no configuration's name; allowed: parts of {', '.join(names)}"
        )
    jobs = [
        (name, architecture, aligned)
        for name in chosen
        for architecture in architectures
        for aligned in ((True, False) if unaligned else (True,))
    ]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(_compile_configuration, jobs) for row in rows]


def shipped_configurations() -> dict[str, Any]:
    """The calls of all kernel files, by the configuration's name."""
    import importlib

    calls: dict[str, Any] = {}
    for file in FILES:
        module = importlib.import_module(f"pkm_triton.kernels.{file}")
        calls |= module.shipped_configurations()
    return calls


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Record what kernels would be launched with, instead of launching them."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def _compile_configuration(job: tuple[str, str, bool]) -> list[dict[str, Any]]:
    from unittest.mock import patch

    name, architecture, aligned = job
    from pkm_triton.kernels.launch import Chip

    chip = Chip(architecture, *CHIPS[architecture])
    chosen = patch("pkm_triton.kernels.launch.chip", lambda device: chip)
    with chosen, recorded_launches() as launches:
        shipped_configurations()[name]()
    rows = [
        {"configuration": name, **compile_launch(*launch, architecture, aligned)}
        for launch in launches
    ]
    # What is launched again and again is told once.
    return [row for place, row in enumerate(rows) if row not in rows[:place]]


def compile_launch(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: str, aligned: bool
) -> dict[str, Any]:
    """Compile a recorded launch for an architecture, and describe the outcome."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    bound = dict(zip(kernel.arg_names, args, strict=False))
    constants = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
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
        target = GPUTarget("hip", architecture, 64)
        options.pop("maxnreg", None)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with _driver_of(target):
        compiled = triton.compile(source, target=target, options=options)
    row = {
        "kernel": kernel.__name__,
        "architecture": architecture,
        "aligned": aligned,
        "shared": compiled.metadata.shared,
        "offsets": offset_widths(compiled.asm["ttir"]),
    }
    describe = _describe_amd if architecture.startswith("gfx") else _describe_nvidia
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


def offset_widths(ttir: str) -> str:
    """The widths of the integer products in the intermediate code, most of them offsets."""
    widths = Counter(re.findall(r"arith\.muli [^\n]*?(i32|i64)>? *(?:loc|\n)", ttir))
    return "+".join(f"{count}x{width}" for width, count in sorted(widths.items()))


def _describe_nvidia(compiled: Any, architecture: str) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", path)
        code = _output(tools / "nvdisasm", "-c", path)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code)
    names = Counter(found)
    warps = compiled.metadata.num_warps
    return {
        "registers": used["REG"],
        "spilled": sum(count for name, count in names.items() if name.startswith(("LDL", "STL"))),
        "occupancy": occupancy(used["REG"], compiled.metadata.shared, warps, architecture),
        "load": _widest(names, ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")),
        "store": _widest(names, ("STG",)),
        "atomics": sum(count for name, count in names.items() if name.startswith(("ATOM", "RED."))),
        "barriers": sum(count for name, count in names.items() if name.startswith("BAR")),
        "instructions": sum(names.values()),
    }


def _describe_amd(compiled: Any, architecture: str) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+)", code)
        return int(found.group(1)) if found else 0

    names = Counter(re.findall(r"^\s+([a-z]\w+_\w+)", code, re.MULTILINE))

    def widest(pattern: str) -> int:
        sizes = {"x4": 128, "x3": 96, "x2": 64, "short": 16, "ushort": 16, "dword": 32}
        best = 0
        for name in names:
            if re.search(pattern, name):
                best = max(best, *(bits for end, bits in sizes.items() if end in name), 0)
        return best

    return {
        "registers": field(r"\.vgpr_count"),
        "spilled": field(r"\.vgpr_spill_count"),
        "occupancy": "",
        "load": widest(r"(global|buffer)_load"),
        "store": widest(r"(global|buffer)_store"),
        "atomics": sum(count for name, count in names.items() if "atomic" in name),
        "barriers": names["s_barrier"],
        "instructions": sum(names.values()),
    }


def _output(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _widest(names: Counter[str], kinds: tuple[str, ...]) -> int:
    """The bits of the widest access among instructions of some kinds; 32 if none states its."""
    best = 0
    for name in names:
        if name.split(".")[0] in kinds:
            sizes = [int(part) for part in re.findall(r"\.(?:U|S)?(8|16|64|128)\b", name)]
            best = max(best, max(sizes, default=32))
    return best


def occupancy(registers: int, shared: int, warps: int, architecture: str) -> int:
    """Percent of a multiprocessor's warps that the resources of a program leave room for."""
    all_registers, all_shared, all_warps, all_blocks = LIMITS[architecture]
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * warps)
    blocks = min(all_blocks, all_warps // warps, by_registers, all_shared // (shared + 1024))
    return 100 * blocks * warps // all_warps
