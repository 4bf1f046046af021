"""Which checks are done, where, and what must be there for them."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import pkm_triton as pkm
from pkm_triton.perf.records.environment import why_no_gpu
from pkm_triton.perf.records.files import ensure_writable

from . import lookups, machinery, reads, speed, steps, tables
from .outcome import Check
from .plants import plant
from .setting import Setting

BACKENDS = ("triton", "torch")


@contextmanager
def prepared(backend: str, planted: str | None) -> Iterator[torch.device]:
    """The device to check on, while the backend is in force and the bug planted.

    Raises:
        ValueError: a name is unknown, or the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    device = torch.device("cpu")
    if backend == "triton":
        device = _device_of_kernels()
    if planted is not None:
        plant(planted)
    with pkm.use_backend("triton" if backend == "triton" else "torch"), warnings.catch_warnings():
        # NumPy's, of the NaN and infinities that the interpreter is given.
        warnings.simplefilter("ignore", RuntimeWarning)
        # torch's own, where it traces a Function.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        yield device


def _device_of_kernels() -> torch.device:
    if os.environ.get("TRITON_INTERPRET") == "1":  # even where there is a GPU
        return torch.device("cpu")
    if torch.cuda.is_available():
        try:
            _check_capability()
            torch.zeros(1, device="cuda")
        except RuntimeError as error:
            raise ValueError(
                f"device: the GPU cannot be used ({str(error).splitlines()[0]}). Does another "
                "process fill it, or is its driver older than torch's toolkit "
                f"({torch.version.cuda or torch.version.hip})? nvidia-smi tells; "
                "CUDA_VISIBLE_DEVICES chooses another one"
            ) from error
        _check_cache()
        _check_compiler()
        return torch.device("cuda", torch.cuda.current_device())
    raise ValueError(
        f"device: no GPU ({why_no_gpu()}). TRITON_INTERPRET=1 pkm-perf check interprets the "
        "kernels on the CPU, and --backend torch checks the reference"
    )


def _check_capability() -> None:
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        raise ValueError(
            f"device: {torch.cuda.get_device_name()} has compute capability "
            f"{capability[0]}.{capability[1]}; the kernels need 8.0 or higher. --backend torch "
            "checks the reference"
        )


def _check_cache() -> None:
    """Triton writes what it compiles; where it cannot, it fails at the first kernel."""
    from triton import knobs

    path = Path(knobs.cache.dir)
    try:
        ensure_writable(path)
    except ValueError as error:
        raise ValueError(
            f"cache: triton cannot write its kernels in {str(path)!r}; set TRITON_CACHE_DIR to a "
            "folder that can be written"
        ) from error


def _check_compiler() -> None:
    """Triton compiles its driver when it is first asked for one; without it no kernel starts."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"device: triton cannot start here ({text[-200:]}). It needs a C compiler and Python's "
            "headers: on Debian and Ubuntu apt install gcc python3-dev"
        ) from error


def make_checks(
    device: torch.device, *, quick: bool, with_speed: bool, only: Sequence[str] | None
) -> list[Check]:
    """All checks for a device, numerics first.

    Raises:
        ValueError: nothing is left of them.
    """
    interpreted = pkm.backend() == "triton" and device.type == "cpu"
    setting = Setting(device, device.type != "cuda", quick, interpreted)
    modules = [lookups, reads, tables, steps, machinery]
    checks = [check for module in modules for check in module.checks(setting)]
    if with_speed:
        checks += speed.checks(setting)
    if only:
        groups = list(dict.fromkeys(check.group for check in checks))
        chosen: list[Check] = []
        for text in only:
            found = [each for each in checks if text in f"{each.group}: {each.name}"]
            if not found:
                raise ValueError(
                    f"only: no check's name holds {text!r}; allowed: a group ({', '.join(groups)}) "
                    f"or a part of a name, such as {checks[0].name!r}"
                )
            chosen += found
        checks = [check for check in checks if check in chosen]
    return checks
