"""One point of a sweep: what is measured, with which sizes, on which device."""

from dataclasses import dataclass
from typing import Any

import torch

from .row_file import added

COMPILED = {
    "textbook-compiled": "default",
    "textbook-tuned": "max-autotune-no-cudagraphs",
}
"""The mode of `torch.compile` by implementation."""
IMPLEMENTATIONS = ("pkm_triton", "textbook", *COMPILED, "product-key-memory")
KEYS = ("product", "flat")
PASSES = ("forward", "forward+backward", "step", "fused-step")
READS = ("layer", "uniform", "zipf", "trained")
LAYOUTS = ("none", "columns", "rows")
NORMS = ("batch", "layer", "none")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """`value` is one of `allowed`.

    Raises:
        ValueError: it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class Point:
    """The parameters of one measurement. Two points with equal fields are the same point.

    Attributes:
        implementation: `pkm_triton` (this library), `textbook` (plain PyTorch, written from the
            paper), the same compiled (`textbook-compiled`, `textbook-tuned`: see `COMPILED`) or
            `product-key-memory` (the package of that name).
        keys: `product` (two codebooks of `num_subkeys` sub-keys) or `flat` (`num_subkeys`² keys).
        num_subkeys: |C|; the memory has |C|² slots.
        query_dim: width of one head's query.
        query_norm: `batch`, `layer` or `none`; `product-key-memory` knows `layer` only.
        tokens: tokens in one call.
        pass_name: `forward` (evaluation, no gradients), `forward+backward` (training), `step`
            (and then the optimiser's step: of Adam, or of SparseAdam where the gradient is sparse),
            or `fused-step` (the same from gradients kept as factors; `pkm_triton` only).
        sparse_grad: whether the gradient of the values is sparse; matters in backward only, and
            means nothing to `fused-step`.
        reads: which slots the gather reads: those the `layer` finds, or generated ones,
            `uniform`, `zipf` (the probability of the slot of rank r is proportional to 1 / r) or
            `trained` (as unevenly as a trained memory was seen to read).
        device: `cpu` or `cuda`.
        threads: CPU threads PyTorch may use.
        ranks: processes over which the values are spread; each has `tokens` tokens in a call.
        layout: how they are spread, by `columns` or `rows`; `none` of one rank.

    Raises:
        ValueError: a parameter is out of range.
    """

    implementation: str = "pkm_triton"
    keys: str = "product"
    num_subkeys: int = 512
    top_k: int = 32
    heads: int = 4
    dim: int = 512
    value_dim: int = 512
    query_dim: int = 128
    query_norm: str = "batch"
    tokens: int = 512
    pass_name: str = "forward"
    sparse_grad: bool = False
    dtype: str = "float32"
    reads: str = "layer"
    device: str = "cpu"
    threads: int = 1
    ranks: int = added(4, 1)
    layout: str = added(4, "none")

    def __post_init__(self) -> None:
        require_choice("implementation", self.implementation, IMPLEMENTATIONS)
        require_choice("keys", self.keys, KEYS)
        require_choice("query_norm", self.query_norm, NORMS)
        require_choice("pass", self.pass_name, PASSES)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("reads", self.reads, READS)
        require_choice("device", self.device, ("cpu", "cuda"))
        for name in (
            "num_subkeys",
            "top_k",
            "heads",
            "dim",
            "value_dim",
            "query_dim",
            "tokens",
            "threads",
            "ranks",
        ):
            value: Any = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: {value} is too small; at least 1 is needed")
        if self.query_dim % 2:
            raise ValueError(f"query_dim: {self.query_dim} is odd; it is split into two halves")
        if self.top_k > self.num_slots:
            raise ValueError(
                f"top_k: {self.top_k} is above the {self.num_slots} slots of "
                f"num_subkeys {self.num_subkeys}"
            )
        require_choice("layout", self.layout, LAYOUTS)
        if (self.ranks > 1) != (self.layout != "none"):
            raise ValueError(
                f"layout: {self.layout!r} does not go with ranks {self.ranks}; one rank has none, "
                "more have columns or rows"
            )
        if self.num_slots >= 2**31:
            raise ValueError(
                f"num_subkeys: {self.num_subkeys} makes {self.num_slots} slots; below 2^31 allowed"
            )

    @property
    def num_slots(self) -> int:
        """K, the slots of the memory."""
        return self.num_subkeys**2

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.pass_name != "forward"

    @property
    def steps(self) -> bool:
        """Whether the optimiser makes its step."""
        return self.pass_name in ("step", "fused-step")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and activations."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    def unsupported(self) -> str | None:
        """Why the implementation cannot run this point, or None where it can."""
        if self.pass_name == "fused-step" and self.implementation != "pkm_triton":
            return "pkm_triton alone keeps gradients as factors"
        if self.ranks > 1 and (self.implementation, self.reads) != ("pkm_triton", "layer"):
            return "of ranks, pkm_triton alone is measured, with the layer's own reads"
        if self.implementation != "product-key-memory":
            return None
        needed = {"keys": "product", "query_norm": "layer", "reads": "layer", "value_dim": self.dim}
        for name, value in needed.items():
            if getattr(self, name) != value:
                return f"product-key-memory knows {name} {value} only"
        return None

    def label(self) -> str:
        """A short name for progress bars and messages."""
        return (
            f"{self.implementation} {self.keys} |C|={self.num_subkeys} k={self.top_k} "
            f"H={self.heads} T={self.tokens} {self.pass_name}"
            f"{f' P={self.ranks} {self.layout}' if self.ranks > 1 else ''}"
        )
