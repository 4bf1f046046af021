"""The one rule for numerical tolerances, used everywhere."""

import torch
from torch import Tensor


def rounding_floor(oracle: Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may cost: adding 0.3 to the oracle in `dtype` and taking it off again."""
    rounded = oracle.to(dtype)
    return 2 * ((rounded + 0.3 - 0.3) - rounded).to(torch.float64).abs().max().item()


def assert_close_to_oracle(actual: Tensor, oracle: Tensor, same_precision: Tensor) -> None:
    """The largest error is at most twice that of PyTorch in the same precision, plus a floor.

    Args:
        actual: what is under test.
        oracle: the same by brute force in float64.
        same_precision: the same by plain PyTorch on the inputs' own dtypes.
    """
    assert oracle.dtype == torch.float64
    assert actual.shape == oracle.shape == same_precision.shape
    if oracle.numel() == 0:
        return
    error = (actual.to(torch.float64) - oracle).abs().max().item()
    allowed = 2 * (same_precision.to(torch.float64) - oracle).abs().max().item()
    allowed += rounding_floor(oracle, actual.dtype)
    assert error <= allowed, f"error {error:.3e} against the oracle, allowed {allowed:.3e}"
