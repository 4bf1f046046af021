"""Hand a layer's padding to the memory within it."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("attention_mask", "key_padding_mask")


class _HandOn:
    """A hook of an attention module: shows the mask that is given to it to the layer's memories.

    It is the attention that is hooked, not the layer around it, because checkpointing runs the
    attention again but not the hooks of the layer. The memories are looked for each time, because
    adapters put copies of them in their places.
    """

    def __init__(self, layer: nn.Module, name: str, position: int) -> None:
        self.layer, self.name, self.position = layer, name, position

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(attention, "_is_replica", False):
            _warn("nn.DataParallel calls copies of the layers; DistributedDataParallel does not")
            return
        mask = kwargs.get(self.name)
        if mask is None and len(args) > self.position:
            mask = args[self.position]
        if self.name == "key_padding_mask" and isinstance(
            mask, Tensor
        ):  # torch's own: True or -inf
            mask = ~mask if mask.dtype == torch.bool else mask == 0
            if mask.ndim == 2 and not getattr(attention, "batch_first", True):
                mask = mask.transpose(0, 1)
        module: Any
        for module in self.layer.modules():
            if hasattr(module, "layer_mask"):
                module.layer_mask = mask


def hand_on_padding(model: nn.Module, place: str, memory: nn.Module) -> None:
    """Let the first attention of the layer around `place` show its mask to the memory there."""
    parts = place.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if not isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            continue
        layer = model.get_submodule(".".join(parts[:end]))
        inside = set(memory.modules()) | {layer}
        for module in layer.modules():
            if module in inside:
                continue
            try:
                names = list(inspect.signature(module.forward).parameters)
            except (TypeError, ValueError):
                continue  # a scripted module tells none
            for name in _NAMES:
                if name in names:
                    if not any(isinstance(h, _HandOn) for h in module._forward_pre_hooks.values()):
                        hook = _HandOn(layer, name, names.index(name))
                        module.register_forward_pre_hook(hook, with_kwargs=True)
                    return


def _warn(why: str) -> None:
    warnings.warn(f"padding is not left out of the memories' batch statistics: {why}", stacklevel=4)


def real_tokens(mask: Any, tokens: torch.Size, *, training: bool) -> Tensor | None:
    """Which tokens of x [*tokens, dim] are real, by the mask of an attention.

    Args:
        mask: of the tokens, [B, T] or [B, S], not 0 where real; or [B or 1, heads or 1, T or 1, S]
            (or without heads), True or about 0 where a token sees another, False or very negative
            where not. A token is real if it sees itself.
        tokens: [B, T].
        training: whether the memory is being trained. Only then is it known where the tokens are
            among S > T: last, after a prefix; a cache for generation may have room after them.

    Returns:
        bool [B, T]; None where the mask does not tell, or there is none.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        if training:
            _warn(f"the mask is a {type(mask).__name__}; query_norm='layer' needs none")
        return None
    if mask.ndim == 2 and mask.shape == tokens:
        return mask if mask.dtype == torch.bool else mask != 0
    if len(tokens) != 2 or mask.ndim < 2 or mask.shape[-1] < tokens[1]:
        return None
    length = tokens[1]
    if mask.ndim == 2:
        seen = mask[:, -length:] != 0
    else:
        if mask.shape[-1] > length and not training:
            return None
        seen = mask if mask.ndim == 3 else mask.flatten(1, -3)[:, 0]
        seen = seen[..., -length:]  # [B or 1, T or 1, T]
        if seen.shape[-2] not in (1, length):
            return None
        seen = seen[:, 0] if seen.shape[-2] == 1 else seen.diagonal(dim1=-2, dim2=-1)
        if seen.is_floating_point():
            seen = seen > torch.finfo(seen.dtype).min / 2
    return seen.to(torch.bool).expand(tokens)
