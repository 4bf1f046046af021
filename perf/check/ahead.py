"""Compile kernels before the checks begin, several at once: one by one it takes minutes."""

import os
from collections.abc import Sequence
from contextlib import suppress

import torch

from .outcome import Check

_MOST_THREADS = 32


def compile_ahead(checks: Sequence[Check], device: torch.device) -> None:
    """On a GPU, compile the kernels that checks name beforehand; says so first."""
    if device.type != "cuda":
        return
    from pkm_triton.kernels.chip import as_if, chip_of
    from pkm_triton.kernels.launches import compile_launches, recorded_launches

    with as_if(chip_of(device)), recorded_launches() as launches:
        for check in checks:
            if check.launch is not None:
                check.launch()
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    print(f"Compiling the kernels of {len(launches)} launches, {threads} at once", flush=True)
    # A kernel that cannot be compiled is what its check will tell.
    with suppress(Exception), torch.cuda.device(device):
        compile_launches(launches, threads)
