"""At home in Hugging Face: memories that `config` carries, and that loading brings back.

Importing this package tells transformers how to load models with memories; after that its own
`from_pretrained` and `AutoModelForCausalLM` bring them back. It needs transformers 5.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("pkm_triton.hf needs transformers 5: pip install 'pkm-triton[hf]'")

from .config import MemoryConfig
from .loading import from_pretrained
from .memories import add_memories, write_config

__all__ = ["MemoryConfig", "add_memories", "from_pretrained", "write_config"]
