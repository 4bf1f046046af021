"""Memory: what a pass allocates, to the byte, and what there is."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class PeakMemory:
    """Bytes above what was allocated before the call.

    Attributes:
        peak_bytes: the most that was alive at one time.
        working_bytes: the same, not counting the tensors named as kept.
    """

    peak_bytes: int
    working_bytes: int


def measure_peak(
    call: Callable[[], object],
    kept: Callable[[], Iterable[Tensor]] = tuple,
    *,
    device: str = "cpu",
) -> PeakMemory:
    """Run `call` once and follow every allocation torch's allocator makes on the device.

    The profiler reports each allocation and each release with its address and size, so the
    figures are exact and repeat. Memory that libraries take elsewhere is not seen, and the call
    should not release what was allocated before it.

    Args:
        call: what to run.
        kept: returns, after the call, the tensors not to count as working memory (gradients).
        device: `cpu` or `cuda`.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop lines on stderr
    # Events of one cycle or of all are the same here, but without it torch 2.11 warns.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        addresses = {tensor.untyped_storage().data_ptr() for tensor in _storages(kept())}
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    roots = results.kineto_results.experimental_event_tree()
    return _peak(_allocations(roots, device), addresses)


def _storages(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for tensor in tensors:
        if tensor.is_sparse:
            yield tensor._indices()
            yield tensor._values()
        else:
            yield tensor


def _allocations(roots: Sequence[_ProfilerEvent], device: str) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation in time order; bytes are negative for a release."""
    found: list[tuple[int, int, int]] = []
    pending = list(reversed(roots))
    while pending:
        event = pending.pop()
        pending.extend(reversed(event.children))
        if event.tag == _EventType.Allocation:
            fields: Any = event.extra_fields
            if fields.device.type == device:
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda item: item[0])
    return [(address, size) for _, address, size in found]


def _peak(allocations: Sequence[tuple[int, int]], kept: set[int]) -> PeakMemory:
    last = {address: place for place, (address, size) in enumerate(allocations) if size > 0}
    total = peak = working = working_peak = 0
    for place, (address, size) in enumerate(allocations):
        total += size
        if not (address in kept and place == last.get(address)):
            working += size
        peak, working_peak = max(peak, total), max(working_peak, working)
    return PeakMemory(peak, working_peak)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, whoever raised it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU's allocator; CUDA, Triton and HIP; cuBLAS.
    words = ("allocate memory", "out of memory", "outofmemory", "status_alloc_failed")
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def available_bytes(device: str) -> int:
    """Memory that can still be allocated: on the GPU, or within this process's control group."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    import psutil  # on a GPU it is not needed

    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return available
    return min(available, limit - psutil.Process().memory_info().rss)
