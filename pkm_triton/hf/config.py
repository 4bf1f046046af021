"""The part of a transformers config that says which memories a model has."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "pkm_triton"
# transformers refuses to load a model with a fusion it does not know, and names it.
GUARD = "memories of pkm_triton (pip install pkm-triton and import pkm_triton.hf before loading)"


class MemoryConfig(QuantizationConfigMixin):
    """The memories of a model, as plain data; stands in its config as `quantization_config`.

    transformers' registry of quantisers is the one official hook that reaches every
    `from_pretrained` after the model is built and before its weights are read.

    Args:
        memories: of each memory its name in the model, its kind, the arguments that make it, and
            the dtypes of those of its tensors that have not the model's.
        shared: the names of each parameter that several memories share.
        dtype: the model's.
        inner: the config of the model's own quantiser, if it has one.
    """

    def __init__(
        self,
        memories: Sequence[dict[str, Any]] = (),
        shared: Sequence[Sequence[str]] = (),
        dtype: str = "float32",
        inner: dict[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.memories = list(memories)
        self.shared = [list(names) for names in shared]
        self.dtype = dtype
        self.inner = inner

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's: transformers reads the config of a live model as that of a file."""
        return getattr(self, name, default)


AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)  # of an earlier import of this module
register_quantization_config(METHOD)(MemoryConfig)


def write(model: PreTrainedModel, memories: MemoryConfig) -> None:
    """Set a model's memories in its config; those of a quantised one beside its quantiser."""
    config: Any = model.config
    present = getattr(config, "quantization_config", None)
    if present is not None:
        given = present if isinstance(present, dict) else present.to_dict()
        memories.inner = given.get("inner") if given.get("quant_method") == METHOD else given
    config.quantization_config = memories
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), GUARD: False}


def without_guard(config: Any) -> Any:
    """A config that this package is loading: what refuses to load it without is taken out."""
    fusions = dict(getattr(config, "fusion_config", None) or {})
    if fusions.pop(GUARD, None) is not None:
        if fusions:
            config.fusion_config = fusions
        else:
            del config.fusion_config
    return config
