"""Calls as CUDA graphs, which run their kernels without launching each."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def captured(run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A call as a graph, after three on another stream as torch asks for, and its result.

    Raises:
        RuntimeError: something in it waits for the device, or cannot be captured.
    """
    stream = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = run()
    except RuntimeError:
        # Where a capture fails torch leaves the stream of the capture current.
        torch.cuda.set_stream(stream)
        raise
    return graph, out
