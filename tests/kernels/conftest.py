"""The kernels' tests run compiled where there is a GPU, else in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before the first kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")


@pytest.fixture
def guarded():
    """The guard of the interpreter, to be made with a seed for the order of programs."""
    if torch.cuda.is_available():
        pytest.skip("orders programs in the interpreter")
    from .guard import Guard

    return Guard


@pytest.fixture
def guard():
    """A guard of the interpreter around the test; None on a GPU."""
    if torch.cuda.is_available():
        yield None
        return
    from .guard import Guard

    with Guard() as active:
        yield active


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """`empty` full of NaN, or of the largest integers, so that nothing unwritten passes."""

    def poison(tensor):
        floating = tensor.is_floating_point()
        return tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max)

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs))
    )


@pytest.fixture(params=[8, 1], ids=["stretch8", "stretch1"])
def stretch(request, monkeypatch):
    """Few reads a program, so that runs are long beside them."""
    from pkm_triton.kernels.reads import runs

    monkeypatch.setattr(runs, "LEAST_STRETCH", request.param)
