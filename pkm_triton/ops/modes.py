"""What a call is made under: whether the bare operator will do, or which Function it takes."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is active.

    Then a call goes through a Function that has rules for both. Compiled code never does: the
    compiler refuses rules of forward mode.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is made of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def differentiated_again() -> bool:
    """Whether a backward pass is to be differentiated in turn.

    Then it is made of the ops themselves, else in one pass by an operator of its own.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed()
