"""Look at the feed-forward network of a layer: how it is called, its widths, its dtype."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ._checks import FLOATING_DTYPES


def check_called_as_a_map(layer: nn.Module, ffn: str) -> None:
    """The layer calls its module `ffn` as y = ffn(x), as far as its source tells.

    Raises:
        ValueError: if it hands over more than x, or takes more than y.
    """
    reason = _no_map(layer, ffn)
    if reason is not None:
        raise ValueError(f"ffn is {ffn!r}, {reason}: a memory is y = f(x). {candidates(layer)}")


def _no_map(layer: nn.Module, ffn: str) -> str | None:
    """Why the module `ffn` is not called as y = ffn(x); None if it is, or nothing tells."""
    parent_name, _, name = ffn.rpartition(".")
    parent, module = layer.get_submodule(parent_name), layer.get_submodule(ffn)
    for call, unpacked in _calls(type(parent), name):
        if unpacked or len(call.args) != 1 or call.keywords:
            told = "takes apart what it returns" if unpacked else "hands over more than x"
            return f"but {type(parent).__name__} {told}, {ast.unparse(call)}"
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    if len(needed) > 1:
        return f"a {type(module).__name__}, which takes {', '.join(needed)}"
    return None


@functools.cache
def _calls(kind: type[nn.Module], name: str) -> list[tuple[ast.Call, bool]]:
    """The calls of `self.name` in a class, and whether what each returns is taken apart."""
    found = []
    for _, function in inspect.getmembers(kind, inspect.isfunction):
        if function.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, SyntaxError):
            continue  # made without a source
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}":
                parent = parents[node]
                unpacked = isinstance(parent, ast.Subscript) or (
                    isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
                )
                found.append((node, unpacked))
    return found


def check_widths(layer: nn.Module, ffn: str, dim: int, value_dim: int) -> None:
    """A memory of those widths fits in the place of `ffn`, as far as running it tells.

    Raises:
        ValueError: if the widths differ, or `ffn` returns no tensor of the shape of its input.
    """
    module = layer.get_submodule(ffn)
    for width in (dim, *_widths(module)):
        out = _run(module, width)
        if out is None:
            continue
        if not isinstance(out, Tensor) or out.shape[:-1] != (1, 2):
            raise ValueError(
                f"ffn is {ffn!r}, a {type(module).__name__}, which returns "
                f"{_shape(out)} for x [1, 2, {width}]: a memory is y = f(x). {candidates(layer)}"
            )
        if (dim, value_dim) != (width, out.shape[-1]):
            raise ValueError(
                f"the memory maps width {dim} to {value_dim}, but the module {ffn!r} that it is "
                f"to replace maps {width} to {out.shape[-1]}"
            )
        return


def _shape(out: object) -> str:
    return str(list(out.shape)) if isinstance(out, Tensor) else f"a {type(out).__name__}"


def _widths(module: nn.Module) -> list[int]:
    """Widths that the module may take: sizes of its matrices."""
    sizes = (size for p in module.parameters() if p.ndim >= 2 for size in p.shape[-2:])
    return list(dict.fromkeys(sizes))[:6]


def _run(module: nn.Module, width: int) -> object | None:
    """What the module returns for x [1, 2, width]; None if it cannot take that.

    On the meta device, where nothing is computed and none of its tensors is touched.
    """
    state = {
        name: torch.empty_like(tensor, device="meta", dtype=_trained_dtype(tensor))
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    floating = [t.dtype for t in state.values() if t.is_floating_point()]
    x = torch.empty(1, 2, width, device="meta", dtype=floating[0] if floating else None)
    try:
        with torch.no_grad():
            return torch.func.functional_call(module, state, (x,))
    except Exception:  # of any class: the code of any model
        return None


def _trained_dtype(tensor: Tensor) -> torch.dtype:
    floating = tensor.is_floating_point() and tensor.dtype not in FLOATING_DTYPES
    return torch.float32 if floating else tensor.dtype


def candidates(layer: nn.Module) -> str:
    """A sentence on which modules of a layer a memory could replace."""
    names = [name for name in _maps(layer, "") if _no_map(layer, name) is None]
    if not names:
        within = ", ".join(repr(name) for name, _ in layer.named_children())
        return f"No module of the layer maps x to a y of its width; it has {within}."
    return f"Modules of the layer that map x to a y of its width: {', '.join(map(repr, names))}."


def _maps(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if sum(p.ndim >= 2 for p in child.parameters()) >= 2:
            outs = ((width, _run(child, width)) for width in _widths(child))
            if any(isinstance(y, Tensor) and y.shape == (1, 2, width) for width, y in outs):
                yield f"{prefix}{name}"
                continue
        yield from _maps(child, f"{prefix}{name}.")


def memory_dtype(model: nn.Module, replaced: nn.Module) -> torch.dtype | None:
    """The dtype for a memory in place of a module: what that is trained in.

    Quantised weights, float8 or integers, are trained in none: then it is the dtype of most of the
    model. None where nothing tells.
    """
    own = list(replaced.parameters())
    if all(p.dtype in FLOATING_DTYPES for p in own) and own:
        return own[0].dtype
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in FLOATING_DTYPES and parameter.ndim >= 2:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None
