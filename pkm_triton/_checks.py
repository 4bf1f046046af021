"""Argument checks: a user's mistake is named, with its value and what is allowed."""

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SLOTS = 2**31 - 1  # slots are int32
SparseGrad = bool | Literal["factored"]


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(str(size) for size in tensor.shape)}]"


def check_tensor(name: str, tensor: Tensor, form: str, dimensions: int, *, exact: bool) -> None:
    """`tensor` is a floating tensor of (at least) so many dimensions, its shape written `form`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {form}, not {type(tensor).__name__}")
    if tensor.ndim != dimensions if exact else tensor.ndim < dimensions:
        raise ValueError(f"{name} must have shape {form}, not {_shape(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested:
        check_dense(name, tensor)
    if tensor.dtype not in FLOATING_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOATING_DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}, but must be one of {allowed}")


def check_dense(name: str, tensor: Tensor) -> None:
    """`tensor` is neither sparse in any layout nor nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} has layout {layout}, but must be a dense tensor (torch.strided)")


def check_same_device(**tensors: Tensor) -> None:
    """All tensors lie on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, but got {where}")


def check_integer(name: str, value: int, minimum: int) -> int:
    """`value` is an integer, not a bool, of at least `minimum`; returned as an int."""
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if is_bool or number < minimum:
        raise ValueError(f"{name} is {value}, but must be an integer of at least {minimum}")
    return number


def check_top_k(top_k: int, num_slots: int) -> int:
    """1 <= top_k <= K, and K fits into int32."""
    if num_slots > MAX_SLOTS:
        raise ValueError(f"{num_slots} slots are too many: slots are int32, at most {MAX_SLOTS}")
    top_k = check_integer("top_k", top_k, 1)
    if top_k > num_slots:
        raise ValueError(f"top_k is {top_k}, but there are only {num_slots} slots")
    return top_k


def check_product_key_topk(query: Tensor, subkeys: Tensor, top_k: int) -> int:
    """The arguments of `product_key_topk`; returns top_k as an int."""
    check_tensor("query", query, "[..., H, d_q]", 2, exact=False)
    check_tensor("subkeys", subkeys, "[H, 2, N, d_q / 2]", 4, exact=True)
    heads, halves, num_subkeys, half_width = subkeys.shape
    if halves != 2 or heads < 1 or num_subkeys < 1 or half_width < 1:
        raise ValueError(f"subkeys must have shape [H, 2, N, d_q / 2], not {_shape(subkeys)}")
    if query.shape[-2] != heads or query.shape[-1] != 2 * half_width:
        raise ValueError(
            f"query must have shape [..., {heads}, {2 * half_width}] to go with subkeys "
            f"{_shape(subkeys)}, not {_shape(query)}"
        )
    check_same_device(query=query, subkeys=subkeys)
    return check_top_k(top_k, num_subkeys**2)


def check_flat_key_topk(query: Tensor, keys: Tensor, top_k: int) -> int:
    """The arguments of `flat_key_topk`; returns top_k as an int."""
    check_tensor("query", query, "[..., H, d_q]", 2, exact=False)
    check_tensor("keys", keys, "[H, K, d_q]", 3, exact=True)
    heads, num_keys, width = keys.shape
    if heads < 1 or num_keys < 1 or width < 1:
        raise ValueError(f"keys must have shape [H, K, d_q], not {_shape(keys)}")
    if query.shape[-2] != heads or query.shape[-1] != width:
        raise ValueError(
            f"query must have shape [..., {heads}, {width}] to go with keys {_shape(keys)}, "
            f"not {_shape(query)}"
        )
    check_same_device(query=query, keys=keys)
    return check_top_k(top_k, num_keys)


def check_gather_values(values: Tensor, slots: Tensor, weights: Tensor) -> None:
    """The arguments of `gather_values`, but for the range of the slots (see `int32_slots`)."""
    check_table(values, "[K, d_v]")
    check_tensor("weights", weights, "[..., R]", 1, exact=False)
    check_slots(slots)
    check_same_shape(slots, weights)
    check_same_device(values=values, slots=slots, weights=weights)


def check_sample_values(values: Tensor, slots: Tensor, x: Tensor) -> None:
    """The arguments of `sample_values`, but for the range of the slots."""
    check_table(values, "[K, d]")
    check_slots(slots)
    check_tensor("x", x, "[..., d]", 1, exact=False)
    if x.shape[-1] != values.shape[1] or x.shape[:-1] != slots.shape[:-1]:
        form = ", ".join(str(size) for size in (*slots.shape[:-1], values.shape[1]))
        raise ValueError(
            f"x must have shape [{form}] to go with values {_shape(values)} and slots "
            f"{_shape(slots)}, not {_shape(x)}"
        )
    check_same_device(values=values, slots=slots, x=x)


def check_scatter_values(slots: Tensor, weights: Tensor, x: Tensor, num_slots: int) -> int:
    """The arguments of `scatter_values`, but for the range of the slots; num_slots as an int."""
    check_slots(slots)
    check_tensor("weights", weights, "[..., R]", 1, exact=False)
    check_same_shape(slots, weights)
    check_tensor("x", x, "[..., d]", 1, exact=False)
    if x.shape[:-1] != slots.shape[:-1]:
        form = ", ".join([*(str(size) for size in slots.shape[:-1]), "d"])
        raise ValueError(
            f"x must have shape [{form}] to go with slots {_shape(slots)}, not {_shape(x)}"
        )
    check_same_device(slots=slots, weights=weights, x=x)
    num_slots = check_integer("num_slots", num_slots, 0)
    if num_slots > MAX_SLOTS:
        raise ValueError(f"num_slots is {num_slots}, but at most {MAX_SLOTS} are allowed")
    return num_slots


def check_table(values: Tensor, form: str) -> None:
    """`values` is a floating table whose rows int32 can count."""
    check_tensor("values", values, form, 2, exact=True)
    if values.shape[0] > MAX_SLOTS:
        raise ValueError(f"values has {values.shape[0]} rows, but at most {MAX_SLOTS} are allowed")


def check_same_shape(slots: Tensor, weights: Tensor) -> None:
    """`slots` and `weights` have one shape."""
    if slots.shape != weights.shape:
        raise ValueError(
            f"slots and weights must have the same shape, not {_shape(slots)} and {_shape(weights)}"
        )


def check_slots(slots: Tensor, name: str = "slots", form: str = "[..., R]") -> None:
    """`slots` is an int32 or int64 tensor of at least one dimension."""
    if not isinstance(slots, Tensor):
        raise TypeError(f"{name} must be a tensor {form}, not {type(slots).__name__}")
    check_dense(name, slots)
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {slots.dtype}, but must be torch.int32 or torch.int64")
    if slots.ndim < 1:
        raise ValueError(f"{name} must have shape {form}, not []")


def check_slot_range(slots: Tensor, num_slots: int) -> None:
    """Every slot lies in [0, num_slots): checked on the CPU only, where no device is waited for."""
    if slots.device.type == "cpu" and slots.numel() > 0:
        low, high = (int(end) for end in slots.aminmax())
        if low < 0 or high >= num_slots:
            raise ValueError(
                f"slots must lie in [0, {num_slots}), the rows of the table, but range from {low} "
                f"to {high}"
            )


def int32_slots(slots: Tensor, num_slots: int) -> Tensor:
    """`slots` contiguous and as int32, their range checked where that is free.

    Elsewhere a slot out of range stays one: int64 values are clamped so that the cast cannot wrap
    them into range.

    Raises:
        ValueError: for a slot on the CPU that is out of range.
    """
    check_slot_range(slots, num_slots)
    if slots.dtype == torch.int64 and slots.device.type != "cpu":
        slots = slots.clamp(-1, num_slots)
    return slots.to(torch.int32).contiguous()


def check_sparse_grad(sparse_grad: SparseGrad, name: str = "sparse_grad") -> SparseGrad:
    """`sparse_grad` is a bool or "factored"."""
    if sparse_grad != "factored" and not isinstance(sparse_grad, bool):
        raise ValueError(f"{name} is {sparse_grad!r}, but must be True, False or 'factored'")
    return sparse_grad


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """`value` is one of those allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    """`mask` is a bool tensor with one element a token of x [..., dim]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True: a real token), not {kind}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask must have shape {list(x.shape[:-1])} to go with x {_shape(x)}, not "
            f"{_shape(mask)}"
        )
    check_same_device(x=x, mask=mask)


def check_positive(name: str, value: float) -> float:
    """`value` is a finite number above zero."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value}, but must be a finite number above 0")
    return value
