"""Data parallel training whose sparse and factored gradients are averaged as what they are.

`DistributedDataParallel` reduces dense buffers alone: of a table [K, d_v] all of it, every step.
So tables with another gradient are kept out of it, and averaged at the end of each backward pass in
which it averages the rest: its communication hook says so, also under `no_sync()`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from pkm_triton._layer_checks import check_group
from pkm_triton.gradients import FactoredGradient, local
from pkm_triton.memory import _KeyValueMemory
from pkm_triton.sharded_gradient import ShardedGradient

from .gathering import Group, mean_factored, mean_sparse


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """`DistributedDataParallel` that takes memories of every `sparse_grad`.

    Args:
        model: any module; its memory layers are found wherever they are.
        **options: those of `DistributedDataParallel`.

    Raises:
        ValueError: if the model has no parameter but the values of sparse or sharded memories: that
            leaves `DistributedDataParallel` nothing; see `average_gradients`.
    """
    return average_sparse_values(DistributedDataParallel(ignore_sparse_values(model), **options))


def ignore_sparse_values(model: nn.Module) -> nn.Module:
    """Tell `DistributedDataParallel`, whoever will wrap the model, to leave sparse values out.

    Args:
        model: any module; the values of its memories with `sparse_grad` True or "factored", and
            those of `shard_memory`, will be left out, beside what is already.

    Returns:
        The same model.

    Raises:
        ValueError: if that leaves no parameter that requires a gradient.
    """
    values = {id(table) for layer in left_out(model) for table in layer.tables}
    names = [
        f"{prefix}.{name}"  # as DistributedDataParallel spells it, also where the prefix is empty
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in values
    ]
    if values and not any(p.requires_grad for p in model.parameters() if id(p) not in values):
        raise ValueError(
            "model has no parameter for DistributedDataParallel but values that are left out: "
            "train it without, and call average_gradients after each backward pass"
        )
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *names])
    return model


def average_sparse_values(
    parallel: DistributedDataParallel,
    dense_hook: Callable[[Any, Any], Any] = default_hooks.allreduce_hook,
) -> DistributedDataParallel:
    """Average the gradients that `ignore_sparse_values` left out, and start from the same values.

    Args:
        parallel: the model of `ignore_sparse_values`, wrapped.
        dense_hook: how the other gradients are averaged, one of torch's communication hooks whose
            state is the process group.

    Returns:
        `parallel`, with a communication hook if there are such values.

    Raises:
        ValueError: if the values have not been left out.
    """
    layers = left_out(parallel.module)
    for name, module in parallel.module.named_modules():
        tables = [f"{name}.{table}" for table in module.table_names] if module in layers else []
        if not set(tables) <= set(parallel.parameters_to_ignore):
            raise ValueError(
                f"the values of memory {name!r} have sparse_grad={module.sparse_grad!r}"
                f"{' and are sharded' if module.sharding is not None else ''}, but "
                "DistributedDataParallel was not told to leave them out: call "
                "ignore_sparse_values on the model before it is wrapped"
            )
    group = parallel.process_group
    averaged = [layer for layer in layers if layer.sharding is None]
    forms = {id(table): (table, m.sparse_grad) for m in averaged for table in m.tables}
    if not forms:
        return parallel
    for table, _ in forms.values():
        source = distributed.get_global_rank(group, 0) if group is not None else 0
        distributed.broadcast(table.detach(), source, group=group)

    def average() -> None:
        for table, form in forms.values():
            if table.requires_grad:
                _average(table, form, group)

    def hook(state: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:  # pyright: ignore[reportPrivateImportUsage]
        # Once a pass; its end, when all gradients are there, comes in the same order on all ranks.
        if bucket.index() == 0:
            torch.autograd.Variable._execution_engine.queue_callback(average)  # pyright: ignore[reportAttributeAccessIssue]
        return dense_hook(state, bucket)

    parallel.register_comm_hook(group, hook)
    return parallel


def average_gradients(parameters: Tensor | Iterable[Tensor], group: Group = None) -> None:
    """Average the gradients of parameters over all ranks, in place; for loops without a wrapper.

    Dense gradients are all-reduced; of sparse and factored ones what was read is exchanged. Those
    of `shard_memory` and other DTensors are means over the ranks of their mesh already: over these
    they stay as they are, and over ranks of which each has a mesh of its own shards are averaged.

    Args:
        parameters: those of a model; the same on all ranks, in the same order, each with the same
            kind of gradient or, on all ranks, none.
        group: the process group; None: the default.

    Raises:
        ValueError: if the group is neither, of a DTensor's mesh.
        TypeError: if group is no process group.
    """
    check_group(group)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in parameters:
        _is_averaged(parameter, group)
    reduced = []
    for parameter in parameters:
        whole = parameter.grad
        if whole is None or _is_averaged(parameter, group):
            continue
        grad = local(whole)
        if not (isinstance(grad, FactoredGradient) or grad.is_sparse):
            reduced.append((grad, distributed.all_reduce(grad, group=group, async_op=True)))
        elif isinstance(whole, ShardedGradient):
            whole.shard = _mean(grad, local(parameter), group)
        else:
            parameter.grad = _mean(grad, parameter, group)
    for grad, work in reduced:
        work.wait()
        grad /= distributed.get_world_size(group)


def _is_averaged(parameter: Tensor, group: Group) -> bool:
    """Whether the gradient is the mean over the group already: that of a DTensor over its mesh."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return False
    ours = set(distributed.get_process_group_ranks(group))
    theirs = set(mesh.mesh.flatten().tolist())
    if ours <= theirs:
        return True
    if len(ours & theirs) == 1:
        return False
    raise ValueError(
        f"group has the ranks {sorted(ours)}, but a parameter lies over {sorted(theirs)}: all of "
        "the group's must be among those, or this rank alone"
    )


@torch.no_grad()
def _mean(grad: Tensor, table: Tensor, group: Group) -> Tensor:
    """The mean of a gradient that is not dense."""
    mean = mean_factored if isinstance(grad, FactoredGradient) else mean_sparse
    return mean(grad, table, group)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _average(table: Tensor, form: Any, group: Group) -> None:
    grad: Any = table.grad
    table.grad = (mean_factored if form == "factored" else mean_sparse)(grad, table, group)


def left_out(model: nn.Module) -> list[_KeyValueMemory]:
    """Memories whose values data parallelism cannot average, or must not."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _KeyValueMemory) and (module.sparse_grad or module.sharding)
    ]
