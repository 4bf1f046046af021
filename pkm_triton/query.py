"""The query network: from a token to one query a head (paper 3.1, query generation)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._checks import check_choice, check_integer, check_mask, check_tensor
from ._layer_checks import (
    check_device,
    check_dtype,
    check_group,
    check_meets,
    check_module,
    check_widths,
)
from .batch_norm import QueryBatchNorm, QueryLayerNorm, batch_norm
from .norms import ScaledNorm

QueryNorm = Literal["batch", "layer", "rms", "l2"] | None


class QueryNetwork(nn.Module):
    """A linear map, or an MLP with ReLU, that makes a query a head, then a normalisation.

    Batch norm on the query spreads the reads over the memory (paper 4.5, Table 2). It works on all
    H · d_q features, so each head has statistics of its own; masked tokens are left out of them.
    Same inputs, same bits; on a CPU for any number of threads, but where the BLAS library splits a
    matrix product of few tokens (5 to 7 were seen) between threads.

    Args:
        dim: width of a token.
        heads: queries a token.
        query_dim: width of a query, d_q.
        norm: "batch"; over a head's d_q features "layer", "rms" or "l2", to which a query starts
            with the length √d_q and a learned scale; or None.
        hidden: widths of hidden layers; () for a linear map.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: if a size is no integer, hidden no sequence, or dtype no floating dtype.
        ValueError: if a size is below 1, norm unknown, or there is no such device.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        query_dim: int,
        norm: QueryNorm = "batch",
        hidden: Sequence[int] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, 1)
        self.heads = check_integer("heads", heads, 1)
        self.query_dim = check_integer("query_dim", query_dim, 1)
        self.hidden = check_widths("query_hidden", hidden)
        check_dtype(dtype)
        check_device(device)
        check_choice("query_norm", norm, ("batch", "layer", "rms", "l2", None))
        widths = [self.dim, *self.hidden]
        layers: list[nn.Module] = []
        for width, next_width in zip(widths, [*widths[1:], heads * query_dim], strict=True):
            if layers:
                layers.append(nn.ReLU())
            layers.append(nn.Linear(width, next_width, device=device, dtype=dtype))
        self.layers = nn.Sequential(*layers)
        self.norm_name: QueryNorm = norm
        self.norm: nn.Module
        if norm == "batch":
            self.norm = QueryBatchNorm(heads * query_dim, device=device, dtype=dtype)
        elif norm == "layer":
            self.norm = QueryLayerNorm(query_dim, device=device, dtype=dtype)
        elif norm is not None:
            length = query_dim**0.5
            self.norm = ScaledNorm(query_dim, norm, length, device=device, dtype=dtype)
        else:
            self.norm = nn.Identity()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew, as torch.nn does."""
        for module in (*self.layers, self.norm):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries [..., H, d_q] of tokens x [..., dim]; mask [...] is False where x is padding.

        Raises:
            TypeError: if x is no floating tensor, or not of the parameters' dtype outside autocast,
                or mask no bool tensor.
            ValueError: if a shape or a device does not fit.
        """
        check_tensor("x", x, f"[..., {self.dim}]", 1, exact=False)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [..., {self.dim}], not {list(x.shape)}")
        check_meets(x, next(iter(self.layers)))
        if mask is not None:
            check_mask(mask, x)
        query: Tensor = self.layers(x)
        if self.norm_name == "batch":
            # It may be torch's synchronised one now, or wrapped in an adapter.
            rows = query.reshape(math.prod(x.shape[:-1]), query.shape[-1])
            query = batch_norm(self.norm, rows, None if mask is None else mask.flatten())
            return query.view(*x.shape[:-1], self.heads, self.query_dim)
        return self.norm(query.view(*x.shape[:-1], self.heads, self.query_dim))


def synchronise_batch_norm(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make the batch norm of every query network one over all ranks, for data-parallel training.

    As `nn.SyncBatchNorm.convert_sync_batchnorm`, which runs on GPUs only; this runs wherever the
    process group does, gloo on CPUs included, and waits for no device.

    Args:
        model: any module; changed in place. Parameters and statistics stay the same tensors.
        group: the ranks that share a batch; by default all.

    Returns:
        The model.

    Raises:
        TypeError: if model is no module, or group no process group of which this rank is one.
    """
    check_module("model", model)
    check_group(group)
    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.synchronised, module.group = True, group
    return model
