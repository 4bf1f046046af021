"""The machine, its driver and clocks, and the software: what a report has to say about itself."""

import os
import platform
import shutil
import subprocess
from contextlib import AbstractContextManager, nullcontext

import torch

import pkm_triton
from pkm_triton.perf.records.environment import commit, device_name, version_of

_QUERY = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"


def describe(device: torch.device) -> dict[str, str]:
    """Facts about the machine and the software, by name; one that is not known is empty."""
    facts = {
        "device": device_name(device.type),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "pkm_triton": pkm_triton.__version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "devices": str(torch.cuda.device_count()),
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "toolkit": torch.version.cuda or torch.version.hip or "",
        }
    elif os.environ.get("TRITON_INTERPRET") == "1":
        facts["device"] += ", kernels interpreted"
    return facts


def compiling(backend: str) -> AbstractContextManager[dict[str, list[float]]]:
    """A context that collects the seconds of each compilation, by kernel; see `compile_seconds`."""
    if backend != "triton":
        return nullcontext({})
    from pkm_triton.kernels.launches import compile_seconds

    return compile_seconds()


def clocks(device: torch.device) -> str:
    """Driver, clocks, temperature and load of a GPU as nvidia-smi has them; else empty."""
    command = shutil.which("nvidia-smi")
    if command is None or device.type != "cuda":
        return ""
    # By its identity: nvidia-smi counts those that CUDA_VISIBLE_DEVICES hides.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        done = subprocess.run(
            [command, f"--id={identity}", f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    values = done.stdout.splitlines()[0].split(", ") if done.stdout else []
    names = [name.partition(".")[0].replace("_version", "") for name in _QUERY.split(",")]
    names[1:3] = ["multiprocessors at", "memory at"]
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=False))
