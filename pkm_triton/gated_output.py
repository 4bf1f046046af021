"""What follows a memory in Memory+ (Berges et al. 2024, "Memory Layers at Scale")."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Output = Literal["gated", "linear"] | None


class MemoryOutput(nn.Module):
    """W_v(m · silu(W_s x)) of a memory's sum m and the token x, or W_v(m) alone.

    For its backward pass autograd keeps, besides x, four rows [value_dim] a token if "gated", and
    one if "linear"; under `torch.utils.checkpoint` a memory keeps x alone.

    Args:
        dim: width of a token and of the output.
        value_dim: width of a value.
        kind: "gated", or "linear" for no W_s.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        value_proj: W_v, value_dim to dim, with bias.
        gate_proj: W_s, dim to value_dim, with bias; None if "linear".
    """

    def __init__(
        self,
        dim: int,
        value_dim: int,
        kind: Literal["gated", "linear"],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.value_proj = nn.Linear(value_dim, dim, device=device, dtype=dtype)
        self.gate_proj = None
        if kind == "gated":
            self.gate_proj = nn.Linear(dim, value_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights normal with standard deviation dim^-1/2, and biases as torch does."""
        for map in (self.value_proj, self.gate_proj):
            if map is not None:
                map.reset_parameters()
                nn.init.normal_(map.weight, std=self.value_proj.out_features**-0.5)

    def forward(
        self, read: Callable[[Tensor | None], Tensor], x: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The output [..., dim] of tokens x [..., dim].

        It is zero where mask [...] is False, whatever x holds there.

        Args:
            read: of W_s x, or of None where there is no W_s, the sums [..., value_dim]; those
                times silu(W_s x), which a kernel may make in one.
            x: [..., dim].
            mask: [...], bool.
        """
        padding = None if mask is None else ~mask.unsqueeze(-1)
        gate = None
        if self.gate_proj is not None:
            gate = self.gate_proj(x if padding is None else x.masked_fill(padding, 0))
        out = self.value_proj(read(gate))
        return out if padding is None else out.masked_fill(padding, 0)
