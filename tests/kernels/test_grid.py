"""Grids whose second axis is longer than a GPU's."""

import importlib

import pytest
import torch

from pkm_triton import kernels, reference
from pkm_triton.kernels import grid as module

OPTIONS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 2}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (3, 1, (3, 1, 1)),
        (2**31 - 1, 65535, (2**31 - 1, 65535, 1)),
        (1, 65536, (1, 32768, 2)),
        (4, 131_073, (4, 43691, 3)),
        (0, 0, (0, 0, 1)),
    ],
)
def test_folds_what_is_too_long(first, second, expected):
    assert module.grid(first, second) == expected
    x, y, z = expected
    assert x == first
    assert second <= y * z < second + z
    assert max(y, z) <= 65535


@pytest.mark.parametrize(("first", "second"), [(2**31, 1), (1, 65535**2 + 1)])
def test_refuses_more_than_a_gpu_takes(first, second):
    with pytest.raises(ValueError, match=f"{first} by {second} programs"):
        module.grid(first, second)


def test_a_row_wider_than_a_grid(monkeypatch):
    """As the keys of a large flat memory are, with a dense gradient."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(
        importlib.import_module("pkm_triton.kernels.sparse_adam"), "sparse_adam_kernel", Kernel()
    )
    tables = [torch.empty(4, 65536 * 1024, device="meta") for _ in range(4)]
    rows = torch.empty(4, dtype=torch.int64, device="meta")
    kernels.sparse_adam(*tables[:3], rows, tables[3], **OPTIONS)
    assert launched == [(4, 32768, 2)]


@pytest.mark.parametrize("op", ["rows", "reads", "hot row"])
def test_folded_programs_do_all_the_work_once(op, device, guard, monkeypatch):
    monkeypatch.setattr(module, "MOST_ALONG_Y", 4)
    width = 9 * 1024 + 5 if op == "rows" else 5 * 2048 + 3
    tables = [torch.rand(3, width, device=device) for _ in range(3)]
    expected = [table.clone() for table in tables]
    if op == "rows":
        inputs = torch.tensor([0, 2], device=device), torch.randn(2, width, device=device)
        name = "sparse_adam"
    else:
        slots = torch.tensor([[0, 2]] * 9 if op == "reads" else [[2, 2]] * 9, device=device).int()
        weights = torch.rand(9, 2, device=device)
        inputs = torch.randn(9, width, device=device), slots, weights
        name = "scatter_adam"
    getattr(reference, name)(*expected, *inputs, **OPTIONS)
    getattr(kernels, name)(*tables, *inputs, **OPTIONS)
    torch.testing.assert_close(tables, expected, rtol=1e-5, atol=1e-5)
