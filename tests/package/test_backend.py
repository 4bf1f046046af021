import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import pkm_triton as pkm
from pkm_triton import _backend, reference


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_default_and_context():
    assert pkm.backend() == "auto"
    with pkm.use_backend("torch"):
        assert pkm.backend() == "torch"
        with pkm.use_backend("triton"):
            assert pkm.backend() == "triton"
        assert pkm.backend() == "torch"
    assert pkm.backend() == "auto"


def test_set_for_good():
    pkm.use_backend("torch")
    try:
        assert pkm.backend() == "torch"
    finally:
        pkm.use_backend("auto")


def test_threads_do_not_see_each_others_blocks():
    inside, seen = threading.Barrier(2), {}

    def work(name):
        with pkm.use_backend(name):
            inside.wait()
            seen[name] = pkm.backend()
            inside.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"torch": "torch", "triton": "triton"}
    assert pkm.backend() == "auto"


def test_a_call_alone_is_for_every_thread():
    seen = []
    pkm.use_backend("torch")
    try:
        thread = threading.Thread(target=lambda: seen.append(pkm.backend()))
        thread.start()
        thread.join()
    finally:
        pkm.use_backend("auto")
    assert seen == ["torch"]


def test_entered_twice():
    block = pkm.use_backend("torch")
    with block:
        with block:
            assert pkm.backend() == "torch"
        assert pkm.backend() == "torch"
    assert pkm.backend() == "auto"
    with block:
        assert pkm.backend() == "torch"
    assert pkm.backend() == "auto"


def test_generators_closed_out_of_order():
    def steps(name):
        with pkm.use_backend(name):
            yield

    first, second = steps("torch"), steps("triton")
    next(first)
    next(second)
    first.close()
    assert pkm.backend() == "triton"
    second.close()
    assert pkm.backend() == "auto"


def test_a_backward_pass_follows_the_block_it_is_called_in(monkeypatch):
    """In whatever thread of autograd's: torch hands it the context of the caller."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            context = torch._C._get_obj_in_tls("context")
            thread = threading.Thread(target=look, args=(context,))
            thread.start()
            thread.join()
            return grad

    def look(context):
        # As a thread of autograd's for a GPU, which there is not.
        torch._C._stash_obj_in_tls("context", context)
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        seen.append(pkm.backend())
        monkeypatch.undo()
        seen.append(pkm.backend())
        if hasattr(torch._C, "_remove_obj_from_tls"):
            torch._C._remove_obj_from_tls("context")

    with pkm.use_backend("torch"):
        Look.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen == ["torch", "auto"]
    assert pkm.backend() == "auto"


def test_unknown_backend():
    with pytest.raises(
        ValueError, match="backend is 'cuda', but must be one of auto, triton, torch"
    ):
        pkm.use_backend("cuda")
    assert pkm.backend() == "auto"


def test_environment_variable():
    done = run("import pkm_triton; print(pkm_triton.backend())", PKM_TRITON_BACKEND="torch")
    assert done.stdout.strip() == "torch"
    done = run("import pkm_triton; pkm_triton.backend()", PKM_TRITON_BACKEND="fast")
    assert "PKM_TRITON_BACKEND is 'fast', but must be one of" in done.stderr


def test_auto_takes_the_reference_for_cpu_tensors():
    assert _backend.implementation(torch.ones(1)) is reference


class OnGPU:
    """Stands for a tensor on a GPU where there is none."""

    device = torch.device("cuda", 0)
    is_cuda = True

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.fixture
def obstacle(monkeypatch):
    """Sets what stands in Triton's way."""
    _backend._warn.cache_clear()
    yield lambda why: monkeypatch.setattr(_backend, "_obstacle", lambda device: why)
    _backend._warn.cache_clear()


def test_auto_falls_back_with_one_warning(obstacle):
    obstacle("triton is not installed")
    with pytest.warns(UserWarning, match="triton is not installed; tensors on the GPU run the"):
        assert _backend.implementation(OnGPU()) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.implementation(OnGPU()) is reference


def test_asked_for_triton_that_cannot_run(obstacle):
    obstacle("the GPU has compute capability 7.5, but the kernels need 8.0 or higher")
    with pkm.use_backend("triton"), pytest.raises(RuntimeError, match=r"capability 7\.5"):
        _backend.implementation(OnGPU())


def test_float64_is_the_references(obstacle):
    obstacle(None)
    assert _backend.implementation(OnGPU(), OnGPU(torch.float64)) is reference
    with pkm.use_backend("triton"), pytest.raises(TypeError, match="for float64"):
        _backend.implementation(OnGPU(), OnGPU(torch.float64))


def test_obstacles(monkeypatch):
    _backend._obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5, but the kernels need 8.0" in _backend._obstacle(torch.device("cuda", 0))
    _backend._obstacle.cache_clear()
    monkeypatch.setattr(_backend, "triton_is_installed", lambda: False)
    assert "pip install triton" in _backend._obstacle(torch.device("cpu"))
    _backend._obstacle.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is a driver")
def test_triton_without_a_driver_says_what_to_do():
    code = (
        "import torch, pkm_triton as pkm\n"
        "pkm.use_backend('triton')\n"
        "pkm.product_key_topk(torch.randn(3, 2, 8), torch.randn(2, 2, 9, 4), 5)\n"
    )
    done = run(code, TRITON_INTERPRET="0")
    assert "RuntimeError: backend 'triton' was asked for, but triton has no driver" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
