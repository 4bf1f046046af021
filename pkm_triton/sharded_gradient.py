"""Gradients of a sharded table that are no dense tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .factored import FactoredGradient


class ShardedGradient(Tensor):
    """The sparse or factored gradient of a DTensor [K, d_v], of which each rank holds its shard's.

    torch's DTensor takes dense shards alone. This one can be accumulated, scaled, set to zero,
    copied and unscaled by `GradScaler`; `optim.SparseAdam` and `optim.clip_grad_norm_` take it.
    What needs its elements, such as another optimiser, raises NotImplementedError.

    Attributes:
        shard: a sparse COO tensor or a `FactoredGradient`, in the shape of this rank's shard.
        device_mesh, placements: those of the table.
    """

    shard: Any
    device_mesh: Any
    placements: Any

    @staticmethod
    def __new__(cls, shard: Tensor, shape: torch.Size, device_mesh: Any, placements: Any) -> Any:
        """The gradient of a table of that shape, mesh and placements."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=shard.dtype, device=shard.device)
        made.shard, made.device_mesh, made.placements = shard, device_mesh, placements
        return made

    def __init__(self, *_: Any) -> None: ...

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"ShardedGradient(shape={list(self.shape)}, placements={self.placements})"

    def to_local(self) -> Tensor:
        """This rank's part."""
        return self.shard

    def vector_norm(self, norm_type: float = 2.0) -> Tensor:
        """The p-norm, p > 0, of the whole gradient, on all ranks; all must call.

        In float32 (float64 for float64).
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        if isinstance(self.shard, FactoredGradient):
            norm = self.shard.vector_norm(norm_type)
        else:
            values = self.shard.coalesce()._values()
            norm = torch.linalg.vector_norm(values, norm_type, dtype=dtype)
        norms = norm.to(dtype).view(1)
        for dimension in range(self.device_mesh.ndim):
            group = self.device_mesh.get_group(dimension)
            parts = [torch.empty_like(norms) for _ in range(group.size())]
            torch.distributed.all_gather(parts, norms, group)
            norms = torch.cat(parts)
        return torch.linalg.vector_norm(norms, norm_type)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _IMPLEMENTED:
            raise NotImplementedError(
                f"{func} needs the elements of the gradient of a sharded table that is not dense: "
                "pkm_triton.optim.SparseAdam takes it, it can be scaled and clipped; for anything "
                "else use sparse_grad=False"
            )
        return _IMPLEMENTED[func](func, args, kwargs or {})


def _first(args: Any) -> ShardedGradient:
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    return first if isinstance(first, ShardedGradient) else args[1]


def _shard(x: Any) -> Any:
    return x.shard if isinstance(x, ShardedGradient) else x


def _wrapped(like: ShardedGradient, shard: Tensor) -> ShardedGradient:
    return ShardedGradient(shard, like.shape, like.device_mesh, like.placements)


def _apply(func: Any, args: Any, kwargs: Any) -> ShardedGradient:
    """The operator on shards."""
    return _wrapped(_first(args), func(*tree_map(_shard, args), **tree_map(_shard, kwargs)))


def _apply_in_place(func: Any, args: Any, kwargs: Any) -> ShardedGradient:
    func(*tree_map(_shard, args), **tree_map(_shard, kwargs))
    return args[0]


def _new_like(func: Any, args: Any, kwargs: Any) -> ShardedGradient:
    """How autograd begins a copy; `copy_` fills it."""
    return _wrapped(args[0], torch.zeros_like(args[0].shard))


def _each_in_place(func: Any, args: Any, kwargs: Any) -> None:
    func(*tree_map(_elements, args), **kwargs)


def _elements(x: Any) -> Any:
    """What an operation on every element of a gradient changes, in place."""
    x = _shard(x)
    return x._values() if isinstance(x, Tensor) and x.is_sparse else x


def _unscale(func: Any, args: Any, kwargs: Any) -> None:
    """As `GradScaler` does, which must skip a step on all ranks or on none."""
    grads, found_inf, inverse_scale = args
    func([_elements(grad) for grad in grads], found_inf, inverse_scale)
    for mesh in dict.fromkeys(grad.device_mesh for grad in grads if hasattr(grad, "device_mesh")):
        for dimension in range(mesh.ndim):
            group = mesh.get_group(dimension)
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group)


_aten = torch.ops.aten
_IMPLEMENTED = {
    _aten.detach.default: _apply,
    _aten.alias.default: _apply,
    _aten.clone.default: _apply,
    _aten.add.Tensor: _apply,
    _aten.mul.Tensor: _apply,
    _aten.div.Tensor: _apply,
    _aten.zeros_like.default: _apply,
    _aten.new_empty_strided.default: _new_like,
    _aten.copy_.default: _apply_in_place,
    _aten.add_.Tensor: _apply_in_place,
    _aten.mul_.Tensor: _apply_in_place,
    _aten.div_.Tensor: _apply_in_place,
    _aten.zero_.default: _apply_in_place,
    _aten._foreach_zero_.default: lambda _func, args, _kwargs: [g.zero_() for g in args[0]],
    _aten._foreach_mul_.Scalar: _each_in_place,
    _aten._foreach_mul_.Tensor: _each_in_place,
    _aten._foreach_div_.Scalar: _each_in_place,
    _aten._foreach_div_.Tensor: _each_in_place,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}


class LocalShard(torch.autograd.Function):
    """A rank's shard of a DTensor, whose gradient is not dense."""

    @staticmethod
    def forward(ctx: Any, table: Any) -> Tensor:
        """The shard, as a plain tensor."""
        ctx.of = table.shape, table.device_mesh, table.placements
        shard = table.to_local()
        return shard.view_as(shard)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient of the DTensor."""
        (grad,) = grads
        if not grad.is_sparse and not isinstance(grad, FactoredGradient):
            raise TypeError("the gradient of a sparse sharded table is dense")
        return ShardedGradient(grad, *ctx.of)
