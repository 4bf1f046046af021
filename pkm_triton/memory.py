"""The memory layers: product keys (paper 3) and the flat keys they are compared with."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import (
    SparseGrad,
    check_choice,
    check_integer,
    check_mask,
    check_sparse_grad,
    check_tensor,
    check_top_k,
)
from ._layer_checks import check_device, check_dtype
from ._module import HostedModule
from ._padding import real_tokens
from .batch_norm import recomputing
from .gated_output import MemoryOutput, Output
from .norms import LengthNorm, ScaledNorm
from .ops import flat_key_topk, gather_gated_values, gather_values, product_key_topk
from .query import QueryNetwork, QueryNorm
from .slot_tuning import TunedSlots
from .usage import MemoryUsage


class _KeyValueMemory(HostedModule, ABC):
    """What both layers share: a query network, keys, and one table of values for all heads."""

    keys_name: ClassVar[str]
    table_names: ClassVar[tuple[str, ...]] = ("values",)

    def __init__(
        self,
        dim: int,
        value_dim: int | None = None,
        *,
        num_subkeys: int = 512,
        heads: int = 4,
        top_k: int = 32,
        query_dim: int = 512,
        query_norm: QueryNorm = "batch",
        query_hidden: Sequence[int] = (),
        key_norm: LengthNorm | None = None,
        output: Output = None,
        sparse_grad: SparseGrad = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, 1)
        self.value_dim = dim if value_dim is None else check_integer("value_dim", value_dim, 1)
        self.num_subkeys = check_integer("num_subkeys", num_subkeys, 1)
        self.num_slots = self.num_subkeys**2
        self.heads = check_integer("heads", heads, 1)
        self.top_k = check_top_k(top_k, self.num_slots)
        self.query_dim = check_integer("query_dim", query_dim, 2)
        if self.query_dim % 2:
            raise ValueError(f"query_dim is {query_dim}, but must be even: a query has two halves")
        self.sparse_grad: SparseGrad = check_sparse_grad(sparse_grad)
        check_choice("key_norm", key_norm, ("rms", "l2", None))
        check_choice("output", output, ("gated", "linear", None))
        check_dtype(dtype)
        check_device(device)
        self.usages: list[MemoryUsage] = []
        self.layer_mask: Any = None
        self.query_net = QueryNetwork(
            dim, heads, query_dim, query_norm, query_hidden, device=device, dtype=dtype
        )
        keys = torch.empty(self._keys_shape(), device=device, dtype=dtype)
        self.register_parameter(self.keys_name, nn.Parameter(keys))
        self.values = nn.Parameter(
            torch.empty(self.num_slots, self.value_dim, device=device, dtype=dtype)
        )
        self.key_norm = self.output = None
        self.tuned: TunedSlots | None = None
        self.sharding: Any = None
        if key_norm is not None:
            self.key_norm = ScaledNorm(keys.shape[-1], key_norm, 1.0, device=device, dtype=dtype)
        if output is not None:
            self.output = MemoryOutput(dim, self.value_dim, output, device=device, dtype=dtype)
        self.out_dim = self.value_dim if output is None else self.dim
        self._reset_memory()

    @abstractmethod
    def _keys_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def _topk(self, query: Tensor) -> tuple[Tensor, Tensor]: ...

    def _reset_memory(self) -> None:
        keys = getattr(self, self.keys_name)
        bound = keys.shape[-1] ** -0.5
        nn.init.uniform_(keys, -bound, bound)
        if self.sharding is None:
            nn.init.normal_(self.values, std=self.value_dim**-0.5)
        else:
            self.sharding.initialise(self.values, self.value_dim**-0.5)
        for module in (self.key_norm, self.output):
            if module is not None:
                module.reset_parameters()

    def _initialise(self, loaded: set[Tensor]) -> None:
        if loaded.isdisjoint((*self.query_net.parameters(), *self.query_net.buffers())):
            self.query_net.reset_parameters()
        self._reset_memory()

    @property
    def tables(self) -> tuple[nn.Parameter, ...]:
        """The tables of which a token reads a few rows."""
        return tuple(getattr(self, name) for name in self.table_names)

    def _keys(self) -> Tensor:
        keys = getattr(self, self.keys_name)
        return keys if self.key_norm is None else self.key_norm(keys)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew.

        Keys are uniform in ±1 / sqrt(their width), values normal with standard deviation
        value_dim^-1/2, as in the original implementation.
        """
        self.query_net.reset_parameters()
        self._reset_memory()

    def weigh(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """What each query reads, and how much of it: `lookup` after the query network.

        Args:
            query: [..., H, d_q].

        Returns:
            weights [..., H, k], float32 (float64 for float64), the softmax of the scores, and
            slots [..., H, k], int32.
        """
        scores, slots = self._topk(query)
        return scores.softmax(-1), slots

    def lookup(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each token reads, and how much of it.

        Args:
            x: [..., dim].
            mask: [...], bool, False where a token is padding.

        Returns:
            weights [..., H, k], float32, which sum to 1 over k (paper equation 2), and slots
            [..., H, k], int32. A masked token has zero weights, and the slots of some other
            token, so that it reads, and trains, no row that no real token does.

        Raises:
            TypeError: if x is no floating tensor, or not of the parameters' dtype outside
                autocast, or mask no bool tensor.
            ValueError: if a shape or a device does not fit.
        """
        if mask is None:
            return self.weigh(self.query_net(x))
        check_tensor("x", x, f"[..., {self.dim}]", 1, exact=False)
        check_mask(mask, x)
        # Whatever lies in padding, NaN included, must reach neither statistics nor gradients.
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
        weights, slots = self.weigh(self.query_net(x, mask))
        real = mask.unsqueeze(-1).unsqueeze(-1)
        weights = weights * real
        if mask.numel() > 0:
            first = mask.flatten().to(torch.int8).argmax().unsqueeze(0)
            rows = slots.reshape(mask.numel(), self.heads, self.top_k)
            slots = torch.where(real, slots, rows.index_select(0, first)[0])
        return weights, slots

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The memory's output m(x), summed over heads (paper equation 3 and section 3.3).

        Args:
            x: [..., dim].
            mask: [...], bool, False where a token is padding: its output is zero, and it enters
                neither batch statistics nor gradients. By default what the layer around this one
                knows of padding.

        Returns:
            [..., out_dim], outside autocast in the dtype of x.

        Raises:
            TypeError: if x is no floating tensor, or not of the parameters' dtype outside
                autocast, or mask no bool tensor.
            ValueError: if a shape or a device does not fit.
        """
        if self.layer_mask is not None:
            if mask is None and isinstance(x, Tensor):
                batch_norm = self.training and self.query_net.norm_name == "batch"
                mask = real_tokens(self.layer_mask, x.shape[:-1], training=batch_norm)
            self.layer_mask = None
        weights, slots = self.lookup(x, mask)
        if self.usages and not recomputing():
            for usage in self.usages:
                usage.add(slots, weights)
        slots, weights = slots.flatten(-2), weights.flatten(-2)
        # Tables and keys may have others, as under FSDP2's mixed precision, which casts all else.
        dtype = getattr(self, self.keys_name).dtype
        if dtype != x.dtype and not _under_autocast(x.device.type):
            dtype = x.dtype

        # No closure: compiled alone, once the compiler gives up on this function, it would warn.
        read = functools.partial(self._read_in, dtype, x, mask, slots, weights)
        return read() if self.output is None else self.output(read, x, mask)

    def _read_in(self, dtype: torch.dtype, *reads: Any) -> Tensor:
        return self._read(*reads).to(dtype)

    def _read(
        self,
        x: Tensor,
        mask: Tensor | None,
        slots: Tensor,
        weights: Tensor,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The sums [..., value_dim] of what tokens x read: slots and weights [..., R].

        Times silu(gate), if there is a gate [..., value_dim].
        """
        values = self.values
        if self.tuned is None and self.sharding is None:
            form = self._form(values)
            if gate is None:
                return gather_values(values, slots, weights, sparse_grad=form)
            return gather_gated_values(values, slots, weights, gate, form)
        if self.tuned is not None:
            out = self.tuned(values, slots, weights)
        else:
            out = self.sharding.gather(values, slots, weights, self.sparse_grad)
        return out if gate is None else out * F.silu(gate)

    def _form(self, table: Tensor) -> SparseGrad:
        """The form of a table's gradient.

        What a parametrization makes is a whole table, and few of its steps back take another form.
        """
        return self.sparse_grad if table.is_leaf else False

    def arguments(self) -> dict[str, Any]:
        """The arguments that make a layer of this kind and these sizes, as plain data."""
        # What is not set is left out, as it is in files of before these options.
        parts = {"key_norm": self.key_norm, "output": self.output}
        return {
            "dim": self.dim,
            "value_dim": self.value_dim,
            "num_subkeys": self.num_subkeys,
            "heads": self.heads,
            "top_k": self.top_k,
            "query_dim": self.query_dim,
            "query_norm": self.query_net.norm_name,
            "query_hidden": list(self.query_net.hidden),
            "sparse_grad": self.sparse_grad,
            **{name: part.kind for name, part in parts.items() if part is not None},
        }

    def _adopt(self) -> None:
        """Tell who keeps tables equal over ranks of tables that may be new."""
        if self.sharding is not None:
            self.sharding.adopt(self.tables)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not counted by those who count this layer."""
        return {**self.__dict__, "usages": [], "layer_mask": None}

    def extra_repr(self) -> str:
        """The layer's sizes."""
        return (
            f"dim={self.dim}, value_dim={self.value_dim}, num_subkeys={self.num_subkeys}, "
            f"heads={self.heads}, top_k={self.top_k}, query_dim={self.query_dim}, "
            f"num_slots={self.num_slots}, sparse_grad={self.sparse_grad!r}"
        )


def _under_autocast(device: str) -> bool:
    # Of devices that have none, as "meta", torch takes no question.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class ProductKeyMemory(_KeyValueMemory):
    """A product-key memory layer (Lample et al. 2019, section 3).

    A query network makes one query a head. Each query's halves are scored against two codebooks
    of `num_subkeys` sub-keys, which stand for `num_subkeys`² slots; the exact best `top_k` slots
    are found, a softmax over their scores weighs their value rows, and the heads' sums add up.
    Cost grows with `num_subkeys` and `heads · top_k`, not with the number of slots.

    Args:
        dim: width of a token.
        value_dim: width of a value and of the output; by default `dim`.
        num_subkeys: sub-keys a codebook, N = |C|; the memory has N² slots.
        heads: heads, H.
        top_k: slots read a head, k; 1 <= k <= N².
        query_dim: width of a query a head, d_q; even.
        query_norm: normalisation of the query: "batch" (the paper's), "layer", "rms" or "l2" (over
            a head's query, with a learned scale) or None.
        query_hidden: hidden widths of the query network; () makes it linear.
        key_norm: normalisation of each (sub-)key, with a learned scale: "rms", "l2" or None.
        output: what follows the sum m of values: "gated", W_v(m · silu(W_s x)) as in Memory+
            (Berges et al. 2024); "linear", W_v m; or None. The output then is as wide as a token.
        sparse_grad: what the gradient of `values` is: dense (False), sparse (True), or "factored",
            for `optim.SparseAdam` alone (see `gather_values`). Dense where `values` is no parameter
            but made of some (`torch.nn.utils.parametrize`, weight norm).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        query_net: the query network; [..., dim] to [..., H, d_q].
        subkeys: parameter [H, 2, N, d_q / 2].
        values: parameter [N², value_dim], shared by all heads. Layers may share it: see
            `share_values`.
        key_norm, output: the modules of those options, or None.
        out_dim: width of the output.
        tuned: the slots that train, or None for all (see `train_slots`).
        sharding: how `values` lies over ranks, or None (see `distributed.shard_memory`).
        usages: the `MemoryUsage`s that are shown every read of a forward pass (see `track_usage`);
            a pass that checkpointing repeats is shown once.
        layer_mask: the mask of the attention beside the memory, for the next call, which takes it
            unless it is given a mask; set by that attention (see `replace_ffn`).

    Raises:
        TypeError: if a size is no integer, query_hidden no sequence, or dtype no floating dtype.
        ValueError: if a size is out of range, query_dim is odd, query_norm, key_norm or output
            unknown, or there is no such device.
    """

    keys_name = "subkeys"
    subkeys: nn.Parameter

    def _keys_shape(self) -> tuple[int, ...]:
        return (self.heads, 2, self.num_subkeys, self.query_dim // 2)

    def _topk(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return product_key_topk(query, self._keys(), self.top_k)


class FlatKeyMemory(_KeyValueMemory):
    """The paper's baseline: as `ProductKeyMemory`, with an explicit key for every slot.

    Takes the same arguments, has K = num_subkeys² keys a head as its parameter `keys` [H, K, d_q],
    and scores every query against all of them.
    """

    keys_name = "keys"
    keys: nn.Parameter

    def _keys_shape(self) -> tuple[int, ...]:
        return (self.heads, self.num_slots, self.query_dim)

    def _topk(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return flat_key_topk(query, self._keys(), self.top_k)
