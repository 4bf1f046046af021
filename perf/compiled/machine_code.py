"""What stands in compiled code: registers, spills, accesses, size."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Registers, shared memory and warps of a multiprocessor, and its blocks (CUDA C++ Programming
# Guide, technical specifications by compute capability).
LIMITS = {
    "sm_80": (65536, 164 << 10, 64, 32),
    "sm_86": (65536, 100 << 10, 48, 16),
    "sm_89": (65536, 100 << 10, 48, 24),
    "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32),
    "sm_120": (65536, 100 << 10, 48, 24),
}


def offset_widths(ttir: str) -> str:
    """The widths of the integer products in the intermediate code, most of them offsets."""
    widths = Counter(re.findall(r"arith\.muli [^\n]*?(i32|i64)>? *(?:loc|\n)", ttir))
    return "+".join(f"{count}x{width}" for width, count in sorted(widths.items()))


def describe_nvidia(compiled: Any, architecture: str) -> dict[str, Any]:
    """Of a kernel compiled for one of NVIDIA's architectures."""
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
        # Of 128 bits each.
        "bytes": 16 * sum(names.values()),
    }


def describe_amd(compiled: Any, architecture: str) -> dict[str, Any]:
    """Of a kernel compiled for one of AMD's architectures."""
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"{name}:?\s+(\d+)", code)
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
        "bytes": field(r"codeLenInByte ="),
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
