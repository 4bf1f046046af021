"""How a table lies over ranks, and the gather from it.

Shapes: T tokens of this rank, T_all of all, R reads a token, K slots, d_v columns, of which this
rank has K_r and d_r.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from pkm_triton._checks import SparseGrad, check_gather_values
from pkm_triton.ops import gather_values
from pkm_triton.sharded_gradient import LocalShard

from .agreement import tokens_of_all
from .collectives import Route, gather_tokens, gather_weights, return_sums
from .layouts import cut

# Initial values are drawn in blocks of about so many elements, each by a seed of its own.
BLOCK_ELEMENTS = 1 << 20


class Sharding:
    """A table [K, d_v] over the ranks of a mesh, by rows, by columns, or by both.

    Args:
        mesh: one- or two-dimensional.
        layout: "rows" or "columns", for each dimension of the mesh.
        shape: [K, d_v].
        equal_tokens: all ranks have equally many tokens, always.
        narrow_weights: weights are sent in bfloat16.
    """

    def __init__(
        self,
        mesh: Any,
        layout: tuple[str, ...],
        shape: tuple[int, int],
        equal_tokens: bool,
        narrow_weights: bool,
    ) -> None:
        self.mesh, self.layout, self.shape = mesh, layout, shape
        self.equal_tokens, self.narrow_weights = equal_tokens, narrow_weights
        self.placements = tuple(Shard(0 if each == "rows" else 1) for each in layout)
        self.flat = mesh if mesh.ndim == 1 else mesh._flatten()
        self.cut = cut(shape, layout, mesh.shape)
        self.row_part, self.column_part = self.cut.parts[self.flat.get_local_rank()]

    def __deepcopy__(self, memo: Any) -> "Sharding":
        """Itself: it never changes, and process groups have no copies."""
        return self

    def adopt(self, tables: Iterable[Tensor]) -> None:
        """Nothing: a DTensor that takes the place of another knows its mesh."""

    @property
    def ranks(self) -> int:
        """P."""
        return len(self.cut.parts)

    def gather(self, values: Any, slots: Tensor, weights: Tensor, form: SparseGrad) -> Tensor:
        """`gather_values` of this rank's tokens: slots and weights [..., R] to [..., d_v].

        All ranks must call, also those without tokens, and run backward alike.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and (form or not self.equal_tokens):
            # A compiled graph has neither gradients that are not dense nor sizes of other ranks.
            eager: Any = torch.compiler.disable(self._gather)
            return eager(values, slots, weights, form)
        return self._gather(values, slots, weights, form)

    def _gather(self, values: Any, slots: Tensor, weights: Tensor, form: SparseGrad) -> Tensor:
        check_gather_values(values, slots, weights)
        shape = slots.shape
        rows = shape[:-1].numel()
        slots, weights = slots.reshape(rows, shape[-1]), weights.reshape(rows, shape[-1])
        slots = slots.to(torch.int32)
        group, counts = self.flat.get_group(), [rows] * self.ranks
        if not self.equal_tokens:
            enabled = torch.is_grad_enabled()
            records = enabled and (values.requires_grad or weights.requires_grad)
            counts = tokens_of_all(slots, weights, records, group)
        route = Route(counts, self.flat.get_local_rank(), self.cut, group)
        narrow = weights.dtype.itemsize > 2 and self.narrow_weights
        wire = torch.bfloat16 if narrow else weights.dtype
        local, owned = self._owned(gather_tokens(slots, route))
        all_weights = gather_weights(weights, slots, owned, route, wire)
        if local.shape[1] == 0:
            all_weights = all_weights[:, :0]
        del owned
        if form:
            shard: Tensor = LocalShard.apply(values)  # pyright: ignore[reportAssignmentType]
        else:
            shard = values.to_local(grad_placements=self.placements)
        out = return_sums(gather_values(shard, local, all_weights, sparse_grad=form), route)
        return out.view(*shape[:-1], self.shape[1])

    def _owned(self, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """Reads [T_all, R] as rows of this rank, and which of them are; None: all.

        Those that are not shall read nothing new: their token's first that is or, where it has
        none, another token's. If there is none, there are no reads.
        """
        low, high = self.cut.rows[self.row_part]
        if len(self.cut.rows) == 1 or slots.numel() == 0:
            return slots, None
        owned = (slots >= low) & (slots < high)
        tokens = owned.any(-1)
        if not (torch.compiler.is_compiling() or bool(tokens.any())):
            return slots[:, :0], owned
        first = owned.to(torch.int8).argmax(-1, keepdim=True)
        mine = slots.gather(-1, first)
        other = mine.index_select(0, tokens.to(torch.int8).argmax().unsqueeze(0))
        filling = torch.where(tokens.unsqueeze(-1), mine, other)
        # Where a compiled pass has no read at all, it reads the first row or the last.
        return torch.where(owned, slots, filling).sub_(low).clamp_(0, high - low - 1), owned

    @torch.no_grad()
    def initialise(self, values: Any, std: float) -> None:
        """Draw a table's values, normal with that deviation: the same whatever the layout.

        All ranks must call. No rank forms more than a block of rows.
        """
        seed = torch.randint(1 << 62, (1,))
        device = values.to_local().device
        group = self.flat.get_group()
        from_first = seed.to(device)
        source = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(from_first, source, group=group)
        shard, first_seed = values.to_local(), int(from_first)
        (low, high) = self.cut.rows[self.row_part]
        (left, right) = self.cut.columns[self.column_part]
        block = max(1, BLOCK_ELEMENTS // self.shape[1])
        generator = torch.Generator(device)
        for start in range(low // block * block, high, block):
            generator.manual_seed(first_seed + start)
            stop = min(start + block, self.shape[0])
            drawn = torch.empty(
                stop - start, self.shape[1], dtype=torch.float32, device=device
            ).normal_(0, std, generator=generator)
            here = slice(max(start, low), min(stop, high))
            rows = drawn[here.start - start : here.stop - start, left:right]
            shard[here.start - low : here.stop - low] = rows
