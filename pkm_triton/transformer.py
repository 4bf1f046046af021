"""A plain decoder language model with memories, in the paper's form (paper 4 and Figure 3)."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_integer
from ._layer_checks import check_device, check_dtype, check_flag, make_module
from .checkpoints import load_with_memory, save_with_memory
from .memory import ProductKeyMemory, _KeyValueMemory
from .replace import check_layers, replace_ffn

__all__ = ["Transformer", "load_with_memory", "memory_layers", "replace_ffn", "save_with_memory"]


def memory_layers(num_layers: int, n: int) -> tuple[int, ...]:
    """The layers whose FFN becomes a memory: regular intervals (paper 4.3).

    The interval is num_layers / (n + 1), rounded up: 16 layers and 2 memories make 6 and 12, 12
    layers and 1 memory make 6. Where that would pass the last layer the positions are rounded one
    by one.

    Args:
        num_layers: layers of the model, L.
        n: memories, 0 <= n <= L.

    Returns:
        n layer numbers, ascending, counted from 1.

    Raises:
        TypeError: if an argument is no integer.
        ValueError: if num_layers is below 1, or n out of range.
    """
    num_layers, n = check_integer("num_layers", num_layers, 1), check_integer("n", n, 0)
    if n > num_layers:
        raise ValueError(f"n is {n}, but {num_layers} layers hold at most {num_layers} memories")
    interval = math.ceil(num_layers / (n + 1))
    if n * interval <= num_layers:
        return tuple(i * interval for i in range(1, n + 1))
    return tuple(math.ceil(i * num_layers / (n + 1)) for i in range(1, n + 1))


class _Attention(nn.Module):
    """Causal self-attention: x [B, T, dim] to [B, T, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.inputs = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B, T, 3 dim] -> three of [B, heads, T, dim / heads]
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inputs(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.output(out.transpose(1, 2).flatten(-2))


class _Block(nn.Module):
    """Attention, then the FFN or a memory in its place, then perhaps a memory beside the FFN.

    Each is a residual step, x <- x + f(norm(x)), or norm(x + f(x)) with post-norm.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn: nn.Module,
        memory: nn.Module | None,
        *,
        pre_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads, dropout)
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = ffn
        self.memory_norm = None if memory is None else nn.LayerNorm(dim)
        self.memory = memory

    def _step(self, x: Tensor, norm: nn.Module, f: nn.Module) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(f(norm(x)))
        return norm(x + self.dropout(f(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self._step(x, self.attention_norm, self.attention)
        x = self._step(x, self.ffn_norm, self.ffn)
        if self.memory is not None and self.memory_norm is not None:
            x = self._step(x, self.memory_norm, self.memory)
        return x


class Transformer(nn.Module):
    """A decoder language model: learned positions, GELU FFN, output tied to the embeddings.

    In the layers named in `memory_layers` the FFN is replaced by a memory, x <- x + PKM(x) (paper
    4), or a memory is interleaved after the FFN. Takes full sequences: there is no padding mask.

    Args:
        vocab_size: tokens known.
        dim: width of a token, a multiple of heads.
        num_layers: layers, L.
        heads: attention heads.
        context: positions, the longest sequence.
        ffn_dim: hidden width of an FFN; by default 4 · dim.
        norm: "pre" normalises the input of each residual step, and the last output; "post" each
            step's output, and the embeddings, as the original implementation does.
        memory_layers: layers with a memory, counted from 1 (see `memory_layers`).
        make_memory: makes one memory, [..., dim] to [..., dim]; by default ProductKeyMemory(dim).
        interleave: keep the FFN of those layers, and put the memory after it.
        dropout: of attention and of each step's output.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        layers: the L blocks; a block's `ffn` is its FFN or the memory in its place, `memory` an
            interleaved one or None.

    Raises:
        TypeError: if an argument is of another type, or make_memory makes no module.
        ValueError: if a size is out of range, dim no multiple of heads, norm unknown, there is no
            such device, a memory layer does not exist, or a memory has other widths.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        heads: int,
        context: int,
        *,
        ffn_dim: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        memory_layers: Sequence[int] = (),
        make_memory: Callable[[], nn.Module] | None = None,
        interleave: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = check_integer("vocab_size", vocab_size, 1)
        self.dim = check_integer("dim", dim, 1)
        self.context = check_integer("context", context, 1)
        num_layers = check_integer("num_layers", num_layers, 1)
        hidden = 4 * dim if ffn_dim is None else check_integer("ffn_dim", ffn_dim, 1)
        if dim % check_integer("heads", heads, 1):
            raise ValueError(f"dim is {dim}, but must be a multiple of the {heads} heads")
        if norm not in ("pre", "post"):
            raise ValueError(f"norm is {norm!r}, but must be 'pre' or 'post'")
        check_flag("interleave", interleave)
        check_dtype(dtype)
        check_device(device)
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}, but must lie in [0, 1)")
        chosen = check_layers("memory_layers", memory_layers, num_layers)
        make = (lambda: ProductKeyMemory(dim)) if make_memory is None else make_memory
        with nullcontext() if device is None else torch.device(device):
            self.tokens = nn.Embedding(vocab_size, dim)
            self.positions = nn.Embedding(context, dim)
            self.embedding_norm = nn.Identity() if norm == "pre" else nn.LayerNorm(dim)
            self.dropout = nn.Dropout(dropout)
            self.layers = nn.ModuleList()
            for number in range(1, num_layers + 1):
                memory = self._memory(make) if number in chosen else None
                replaced = memory is not None and not interleave
                ffn = memory if replaced else _ffn(dim, hidden)
                assert ffn is not None
                beside = None if replaced else memory
                block = _Block(dim, heads, ffn, beside, pre_norm=norm == "pre", dropout=dropout)
                self.layers.append(block)
            self.output_norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=dim**-0.5)
        self.to(device=device, dtype=dtype)

    def _memory(self, make: Callable[[], nn.Module]) -> nn.Module:
        memory = make_module(make)
        if isinstance(memory, _KeyValueMemory):
            widths = (memory.dim, memory.out_dim)
            if widths != (self.dim, self.dim):
                raise ValueError(
                    f"make_memory makes a memory from width {widths[0]} to {widths[1]}, but both "
                    f"must be dim, {self.dim}"
                )
        return memory

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T], int64 or int32, T <= context.

        Returns:
            [B, T, vocab_size].

        Raises:
            TypeError: if tokens is no integer tensor.
            ValueError: if the shape does not fit.
        """
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be a tensor of torch.int64 or torch.int32, not {kind}")
        if tokens.ndim != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens must have shape [B, T] with T at most {self.context}, the context, not "
                f"{list(tokens.shape)}"
            )
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.output_norm(x), self.tokens.weight)


def _ffn(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
