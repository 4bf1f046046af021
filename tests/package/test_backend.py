import subprocess
import sys
import warnings

import pytest
import torch

import pkm_triton as pkm
from pkm_triton import _backend, reference


def run(code, **environment):
    import os

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


def test_unknown_backend():
    with pytest.raises(
        ValueError, match="backend is 'cuda', but must be one of auto, triton, torch"
    ):
        pkm.use_backend("cuda")
    assert pkm.backend() == "auto"


def test_environment_variable():
    done = run("import pkm_triton; print(pkm_triton.backend())", PKM_TRITON_BACKEND="torch")
    assert done.stdout.strip() == "torch"
    done = run("import pkm_triton", PKM_TRITON_BACKEND="fast")
    assert "PKM_TRITON_BACKEND is 'fast', but must be one of" in done.stderr


def test_auto_takes_the_reference_for_cpu_tensors():
    assert _backend.implementation(torch.device("cpu")) is reference


def test_gpu_without_triton(monkeypatch):
    """One warning and the reference under "auto"; an error if Triton was asked for."""
    monkeypatch.setattr(_backend, "triton_is_installed", lambda: False)
    _backend._warn_without_triton.cache_clear()
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert _backend.implementation(torch.device("cuda")) is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.implementation(torch.device("cuda")) is reference
    with pkm.use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        _backend.implementation(torch.device("cpu"))
    _backend._warn_without_triton.cache_clear()
