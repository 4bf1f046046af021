"""The table on every rank, and its gradient averaged before a backward pass stores it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.weak import WeakIdKeyDictionary

from pkm_triton._checks import SparseGrad
from pkm_triton.gradients import FactoredGradient
from pkm_triton.memory import _KeyValueMemory
from pkm_triton.ops import gather_values

from .gathering import Group, mean_factored, mean_sparse


class Replicas:
    """Tables that every rank of a group has.

    Args:
        group: the process group.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.averaged = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: Any) -> "Replicas":
        """Itself: process groups have no copies."""
        return self

    def gather(self, values: Tensor, slots: Tensor, weights: Tensor, form: SparseGrad) -> Tensor:
        """`gather_values`."""
        return gather_values(values, slots, weights, sparse_grad=form)

    def initialise(self, values: Tensor, std: float) -> None:
        """Draw a table's values: the first rank's on all."""
        nn.init.normal_(values, std=std)
        self.start(values)

    def adopt(self, tables: Iterable[Tensor]) -> None:
        """Average the gradients of tables, also of one that has taken the place of another."""
        for table in tables:
            if table.is_leaf and table.requires_grad and table not in self.averaged:
                self.averaged[table] = _average(table, self)

    @torch.no_grad()
    def start(self, table: Tensor) -> None:
        """Give all ranks the first rank's table, if there is data."""
        if not table.is_meta:
            source = distributed.get_global_rank(self.group, 0) if self.group is not None else 0
            distributed.broadcast(table.detach(), source, group=self.group)

    @torch.no_grad()
    def mean(self, grad: Tensor, table: Tensor) -> Tensor:
        """The mean of all ranks' gradients of a table."""
        if isinstance(grad, FactoredGradient):
            return mean_factored(grad, table, self.group)
        if grad.is_sparse:
            return mean_sparse(grad, table, self.group)
        grad = grad / distributed.get_world_size(self.group)
        distributed.all_reduce(grad, group=self.group)
        return grad


def replicate(model: nn.Module, group: Group) -> None:
    """Give all ranks the tables of the first, and keep them equal.

    The gradient of one pass is averaged before it is added to that of others: once a pass also
    where layers share a table.
    """
    replicas = Replicas(group)
    tables: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        if isinstance(layer, _KeyValueMemory):
            layer.sharding = replicas
            tables |= {id(table): table for table in layer.tables}
    for table in tables.values():
        replicas.start(table)
    replicas.adopt(tables.values())


def _average(table: Tensor, replicas: Replicas) -> Any:
    # Which the table keeps, and must not be kept by.
    this = weakref.ref(table)
    return table.register_hook(lambda grad: replicas.mean(grad, this()))  # pyright: ignore
