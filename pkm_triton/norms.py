"""Normalisation of queries and keys to a length, with a learned scale."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LengthNorm = Literal["rms", "l2"]


class ScaledNorm(nn.Module):
    """A vector over its length, times a learned scale: a feature's own ("rms") or one ("l2").

    Args:
        width: features of a vector.
        kind: "rms" or "l2".
        length: of the results at the start.
        device: of the scale.
        dtype: of the scale.
    """

    def __init__(
        self,
        width: int,
        kind: LengthNorm,
        length: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.kind: LengthNorm = kind
        self.length = length
        features = width if kind == "rms" else 1
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to what it is at the start."""
        root = self.width**0.5 if self.kind == "rms" else 1.0
        nn.init.constant_(self.weight, self.length / root)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width], normalised over its last dimension, in its dtype."""
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.kind == "rms":
            normal = F.rms_norm(wide, (self.width,))
        else:
            normal = F.normalize(wide, dim=-1)
        # One scale as many, so that its gradient's order of sums is that of the features'.
        return (normal * self.weight.expand(self.width)).to(x.dtype)

    def extra_repr(self) -> str:
        """The norm's sizes."""
        return f"{self.width}, kind={self.kind!r}"
