"""The model of a trial."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import pkm_triton as pkm
from pkm_triton.transformer import Transformer

from .trial import Trial


class OneSoftmaxMemory(pkm.ProductKeyMemory):
    """A memory whose heads share one softmax: one weighted mean of all reads, not one a head."""

    def weigh(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """See `ProductKeyMemory.weigh`; here the weights sum to 1 over H and k together."""
        scores, slots = self._topk(query)
        return scores.flatten(-2).softmax(-1).view_as(scores), slots


def memory_maker(
    trial: Trial, spread: Callable[[nn.Module], None] | None = None
) -> Callable[[], nn.Module]:
    """What makes a memory of the trial; `spread` gives it data, if anything does but itself."""
    product = pkm.ProductKeyMemory if trial.softmax == "head" else OneSoftmaxMemory
    kind = product if trial.keys == "product" else pkm.FlatKeyMemory
    norm: Any = None if trial.query_norm == "none" else trial.query_norm

    def make() -> nn.Module:
        memory = kind(
            trial.dim,
            num_subkeys=trial.num_subkeys,
            heads=trial.heads,
            top_k=trial.top_k,
            query_dim=trial.query_dim,
            query_norm=norm,
            sparse_grad=trial.sparse_grad,
            device=None if spread is None else "meta",
        )
        if spread is not None:
            spread(memory)
        getattr(memory, memory.keys_name).requires_grad_(not trial.fixed_keys)
        return memory

    return make


def build_model(
    trial: Trial,
    vocab_size: int,
    device: str = "cpu",
    spread: Callable[[nn.Module], None] | None = None,
) -> Transformer:
    """The transformer of a trial, its parameters drawn from torch's global generator.

    `spread`: gives a memory without data its own (see `Ranks.spread`).
    """
    norm: Any = trial.norm
    return Transformer(
        vocab_size,
        trial.dim,
        trial.layers,
        trial.attention_heads,
        trial.context,
        ffn_dim=trial.ffn_dim,
        norm=norm,
        memory_layers=trial.memories,
        make_memory=memory_maker(trial, spread),
        interleave=trial.interleave,
        device=device,
    )
