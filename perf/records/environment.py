"""Where a figure was measured: device, versions, commit. No names of hosts or users."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import pkm_triton


def resolve_device(device: str) -> str:
    """Turn `auto`, `cpu` or `cuda` into the device to use.

    Raises:
        ValueError: the name is unknown, or there is no CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {device!r} is unknown; allowed: auto, cpu, cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: 'cuda' was asked for, but there is no GPU ({why_no_gpu()})")
    return device


def why_no_gpu() -> str:
    """Why torch uses no GPU, where `torch.cuda.is_available()` is false, and what to do."""
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return f"torch {torch.__version__} is built without CUDA"
    return (
        f"torch {torch.__version__} finds no GPU it can use: is the driver as new as its toolkit, "
        f"{built}? nvidia-smi tells"
    )


def check_threads(threads: int) -> int:
    """`threads`, where this machine has so many cores: torch crashes when asked for far more.

    Raises:
        ValueError: it has not, or there are none.
    """
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ValueError(f"threads: {threads} is not allowed; 1 to {cores}, the cores there are")
    return threads


def check_seed(seed: int) -> int:
    """`seed`, where torch takes it.

    Raises:
        ValueError: it is negative, or above 63 bits.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: {seed} is not allowed; 0 to 2^63 - 1")
    return seed


@functools.cache
def device_name(device: str) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(package: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def commit() -> str:
    """The commit of this project's checkout, with `+` where files differ from it; else empty."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parents[1]:
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """The columns of a row that say which software was measured."""
    return {
        "torch_version": torch.__version__,
        "triton_version": version_of("triton"),
        "pkm_triton_version": pkm_triton.__version__,
        "commit": commit(),
    }
