"""Kernels that write into their arguments."""

import torch
from torch import Tensor


def written(*tensors: Tensor | None) -> None:
    """Tell autograd that a kernel has written into these tensors, as torch's own ops tell it.

    A backward pass that needs what was there before then raises.
    """
    torch.autograd.graph.increment_version(
        [x for x in tensors if x is not None and not x.is_inference()]
    )
