"""Memories whose table is spread over ranks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor

from pkm_triton._layer_checks import check_module
from pkm_triton._optimizer_options import check_flag
from pkm_triton.experts import ProductKeyExperts
from pkm_triton.memory import _KeyValueMemory

from .agreement import agreed
from .layouts import Layout, check_layouts, check_parts
from .optimizers import watch_optimizers
from .replicas import replicate
from .sharding import Sharding


def shard_memory(
    model: nn.Module,
    mesh: DeviceMesh,
    layout: Layout | Sequence[Layout] = "columns",
    *,
    equal_tokens: bool = False,
    narrow_weights: bool = False,
) -> nn.Module:
    """Spread the values of all memories of a model over the ranks of a mesh.

    Each `values` becomes a DTensor parameter, and stays one parameter where layers share it. Every
    rank passes its own tokens, and gets their output at full width. Call it on all ranks, before
    the optimiser is made, and before `fully_shard` or `data_parallel` of this module, which leave
    these values out (torch's `fully_shard` needs `ignored_params=sharded_values(model)`). The rest
    of the model is as it was.

    Layouts, of K rows and d_v columns over P ranks (neither need divide P):

    - "columns": all rows and d_v / P columns on a rank. Each rank gathers its columns for the
      tokens of all, and an all-to-all brings every rank its tokens.
    - "rows": K / P rows on a rank; each sums what it owns of all tokens, and the sums are added up.
    - ("rows", "columns"), or the reverse, for a mesh of two dimensions: "columns" within a node and
      "rows" over nodes.
    - "replicate": the whole table on every rank, as a plain parameter, equal to rank 0's. Sparse
      and factored gradients are averaged as what was read, when a backward pass stores them.

    Gradients follow `DistributedDataParallel`: with the mean loss of its own tokens on each of P
    ranks, `values.grad` is the mean over ranks of the losses' gradients. It needs no averaging;
    gradients add up over backward passes with no communication but the passes' own. The forms of
    `sparse_grad` are those of `gather_values`, of this rank's shard: a DTensor, or a
    `ShardedGradient` of a sparse or factored one, which `optim.SparseAdam` takes. An optimiser that
    cannot step them raises TypeError or ValueError as it is about to.

    In every call all ranks take part, and all that record gradients must run its backward pass, in
    the same order: numbers and kinds of reads are compared first, and all ranks raise where they
    differ, but a rank that leaves a call or a backward pass out cannot be seen, and the others wait
    for it until the group's timeout.

    Within a call nothing overlaps: the gathers of slots and of weights, the sums, and their
    exchange follow each other. With `equal_tokens` the host does not wait for them on a GPU, but
    for one flag in the layout "rows". What the caller has put on another stream overlaps them.

    Values that are there are rank 0's of the mesh. On the meta device no data is made: give it
    memory by `to_empty`, and values by the layer's `reset_parameters` or a checkpoint.

    Args:
        model: any module with `ProductKeyMemory` or `FlatKeyMemory` layers. Changed in place.
        mesh: of one dimension, or two; those ranks alone take part in a forward or backward pass,
            and all of them in each.
        layout: see above; one for each dimension of the mesh.
        equal_tokens: promise that in every call all ranks have equally many tokens. Without it
            ranks compare their numbers first, for which the host waits. It is needed for
            `torch.compile` to trace the layer in one graph, with sparse_grad=False.
        narrow_weights: send the weights of reads in bfloat16, 6 bytes a read instead of 8, with a
            relative error of at most 2^-9 in each.

    Returns:
        The model.

    Raises:
        RuntimeError: if there is no process group.
        TypeError: if model is no module, mesh no DeviceMesh, or a flag no bool. The other ranks
            then raise ValueError, naming this one; where their mesh has but some of all ranks, they
            wait for a rank without a DeviceMesh until the group's timeout.
        ValueError: on all ranks, if on any of them the layout is unknown or does not fit the mesh,
            a memory is sharded already, is of `ProductKeyExperts`, or has slots that train alone,
            a rank would get no row or column, there is no memory, or ranks differ in any of this.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "there is no process group: start the ranks with torchrun, and call "
            "torch.distributed.init_process_group first"
        )

    def described() -> dict[str, Any]:
        _check_mesh(mesh)
        check_module("model", model)
        check_flag("equal_tokens", equal_tokens)
        check_flag("narrow_weights", narrow_weights)
        layouts = check_layouts(layout, mesh.ndim)
        return {
            "layout": layouts,
            "mesh": (mesh.device_type, mesh.mesh.tolist()),
            "equal_tokens": equal_tokens,
            "narrow_weights": narrow_weights,
            **_described(model, layouts, mesh),
        }

    layouts = agreed(described, *_groups(mesh))["layout"]
    watch_optimizers()
    if layouts == ("replicate",):
        replicate(model, mesh.get_group())
        return model
    made: dict[int, tuple[nn.Parameter, Sharding]] = {}
    for layer in _memories(model).values():
        whole = layer.values
        if id(whole) not in made:
            shape = whole.shape[0], whole.shape[1]
            sharding = Sharding(mesh, layouts, shape, equal_tokens, narrow_weights)
            shards = distribute_tensor(whole.detach(), mesh, sharding.placements)
            made[id(whole)] = nn.Parameter(shards, whole.requires_grad), sharding
            whole.is_spread = True  # pyright: ignore[reportAttributeAccessIssue]
        layer.values, layer.sharding = made[id(whole)]
    return model


def sharded_values(model: nn.Module) -> set[nn.Parameter]:
    """The values that `shard_memory` has spread: what `fully_shard` must leave out.

    Args:
        model: any module.
    """
    return {m.values for m in _memories(model).values() if m.sharding is not None}


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, not {type(mesh).__name__}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh is {mesh}, of which this rank {distributed.get_rank()} is no part")
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh has {mesh.ndim} dimensions, but must have 1 or 2")
    if mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise ValueError("mesh has no mesh_dim_names: give its two dimensions names")


def _groups(mesh: Any) -> list[Any]:
    """Among whom to agree: the ranks of the mesh or, where it may be wrong, all there are."""
    if not isinstance(mesh, DeviceMesh) or mesh.size() == distributed.get_world_size():
        return [None]
    if mesh.get_coordinate() is None:
        return []  # the ranks of that mesh do not wait for this one
    return [mesh.get_group(dimension) for dimension in reversed(range(mesh.ndim))]


def _memories(model: nn.Module) -> dict[str, _KeyValueMemory]:
    return {n: m for n, m in model.named_modules() if isinstance(m, _KeyValueMemory)}


def _described(model: nn.Module, layouts: tuple[str, ...], mesh: DeviceMesh) -> dict[str, Any]:
    """What must be the same of each memory on all ranks; refuses what cannot be sharded."""
    memories = _memories(model)
    if not memories:
        raise ValueError("model has no memory: pass a mesh of the ranks that have one")
    seen: dict[int, int] = {}
    tables: dict[str, Any] = {"the names of memories": list(memories)}
    ours = {id(layer) for layer in memories.values()}
    for name, layer in memories.items():
        values: Tensor = layer.values
        if layer.sharding is not None or hasattr(values, "full_tensor"):
            raise ValueError(f"memory {name!r} is sharded already")
        others = [each for each in layer.pool if each._parameters.get("values") is values]
        apart = getattr(values, "is_spread", False) or not ours.issuperset(map(id, others))
        if apart and layouts != ("replicate",):
            raise ValueError(
                f"memory {name!r} shares its values with a memory outside of model: pass a module "
                "that holds all that share them, which get one layout"
            )
        if layouts != ("replicate",):
            if isinstance(layer, ProductKeyExperts):
                raise ValueError(
                    f"memory {name!r} is of ProductKeyExperts, which can be replicated alone"
                )
            if layer.tuned is not None:
                raise ValueError(f"memory {name!r} trains some slots alone: merge_slots first")
            check_parts(name, values.shape, layouts, mesh.shape)
        index = seen.setdefault(id(values), len(seen))
        form = layer.sparse_grad, values.requires_grad, values.is_meta
        described = (index, tuple(values.shape), str(values.dtype), *form)
        tables[f"the table, shape, dtype, sparse_grad, requires_grad and is_meta of {name!r}"] = (
            described
        )
    return tables
