"""What is made current around the kernels: recorded, for here is no second GPU."""

from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from pkm_triton import _backend, _devices


@pytest.fixture
def current(monkeypatch):
    """The devices that are current, the last one innermost, were there such GPUs."""
    stack = []

    @contextmanager
    def device(wanted):
        stack.append(wanted)
        try:
            yield
        finally:
            stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


class OnGPU:
    """Stands for a tensor on a GPU where there is none."""

    is_cuda = True
    dtype = torch.float32

    def __init__(self, index):
        self.device = torch.device("cuda", index)


def test_kernels_run_with_their_tensors_device_current(current, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_backend, "_obstacle", lambda device: None)
    module = ModuleType("kernels")
    seen = []
    module.forward = lambda x, scale: seen.append(list(current)) or x * scale
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: module)
    for index in (1, 0, 3):
        assert _backend.implementation(OnGPU(index)).forward(7, scale=index) == 7 * index
    assert seen == [[torch.device("cuda", index)] for index in (1, 0, 3)]
    assert not current


def test_it_is_taken_back_after_an_error(current):
    def fails():
        assert current
        raise ValueError("wrong")

    module = ModuleType("kernels")
    module.fails = fails
    with pytest.raises(ValueError, match="wrong"):
        _devices.OnDevice(module, torch.device("cuda", 2)).fails()
    assert not current


def test_nothing_is_made_current_on_a_cpu(current):
    with _devices.made_current(torch.device("cpu")):
        assert not current
