"""How transformers brings models with memories back."""

import os
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from pkm_triton._layer_checks import check_path
from pkm_triton.memory import _KeyValueMemory

from .config import METHOD, MemoryConfig, without_guard, write
from .memories import BEFORE_SAVING, build

# The options of `from_pretrained` that say where a config lies, too.
_WHERE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a model with its memories, bitwise, as the class that it was saved from.

    The same as that class's own `from_pretrained`, but for a model without memories, which this
    refuses.

    Args:
        path: a folder written by `save_pretrained` (single or sharded files), or a name on the hub.
        **options: those of `from_pretrained`.

    Returns:
        The model, in evaluation mode.

    Raises:
        TypeError: if path is neither a name nor a Path.
        ValueError: if its config names no memories, or no class of transformers, or the files have
            other parts of a memory than its config.
        OSError: if there is no such model.
    """
    check_path(path)
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        where = {name: options[name] for name in _WHERE if name in options}
        config = AutoConfig.from_pretrained(path if config is None else config, **where)
    found = getattr(config, "quantization_config", None) or {}
    if found.get("quant_method") != METHOD:
        raise ValueError(
            f"the config of {os.fspath(path)!r} names no memories: was add_memories or "
            "write_config called before it was saved?"
        )
    (name, *_) = [*(config.architectures or ()), None]
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ValueError(
            f"the config of {os.fspath(path)!r} names the class {name!r}, which transformers has "
            "not: use the from_pretrained of your class"
        )
    return kind.from_pretrained(path, **options)


def _check_files(model: PreTrainedModel, files: list[str] | None) -> None:
    """The files hold no part of a memory that it has not, and that would be dropped."""
    prefix = f"{model.base_model_prefix}."  # of a model with a head, or of one without
    memories = {
        name.removeprefix(prefix): set(module.state_dict())
        for name, module in model.named_modules()
        if isinstance(module, _KeyValueMemory)
    }
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
        for place, parts in memories.items():
            held = (n.removeprefix(prefix) for n in names)
            more = [
                n for n in held if n.startswith(f"{place}.") and n[len(place) + 1 :] not in parts
            ]
            if more:
                raise ValueError(
                    f"the weights have {', '.join(more)}, which the memory at {place!r} has not, "
                    f"as the config has it: {BEFORE_SAVING}"
                )


_OWN = {
    "inner",
    "memories",
    "postprocess_model",
    "preprocess_model",
    "update_attn_implementation",
    "update_tp_plan",
}


class MemoryQuantizer(HfQuantizer):
    """Puts memories into a model before its weights are read; quantises nothing itself.

    What the model's own quantiser is asked, that answers.
    """

    quantization_config: MemoryConfig

    def __init__(self, quantization_config: MemoryConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.memories = quantization_config
        self.inner: HfQuantizer | None = None
        if quantization_config.inner is not None:
            self.inner = AutoHfQuantizer.from_config(dict(quantization_config.inner), **options)

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if own.get("inner") is None or name in _OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(own["inner"], name)

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is asked about the model's config (`update_tp_plan` before 5.20)."""
        config = without_guard(config)
        inner = self.inner
        return config if inner is None else inner.update_attn_implementation(config)

    def update_tp_plan(self, config: Any) -> Any:
        """As `update_attn_implementation`."""
        config = without_guard(config)
        update = getattr(self.inner or super(), "update_tp_plan", lambda config: config)
        return update(config)

    def preprocess_model(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        """Put the memories in, after the model's own quantiser has seen what they replace."""
        if self.inner is not None:
            self.inner.preprocess_model(model, dtype=dtype, **options)
        build(model, self.memories, dtype)
        _check_files(model, options.get("checkpoint_files"))

    def postprocess_model(self, model: PreTrainedModel, **options: Any) -> PreTrainedModel:
        """Leave no trace of a quantiser but the model's own."""
        if self.inner is not None:
            setattr(model, "hf_quantizer", self.inner)  # noqa: B010  (it is no module's attribute)
            self.inner.postprocess_model(model, **options)
        else:
            self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, _KeyValueMemory):
                vars(module).pop("_initialise", None)
        write(model, self.memories)
        return model

    def is_serializable(self) -> Any:
        """Memories are."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Memories are."""
        return True


AUTO_QUANTIZER_MAPPING.pop(METHOD, None)  # of an earlier import of this module
register_quantizer(METHOD)(MemoryQuantizer)
