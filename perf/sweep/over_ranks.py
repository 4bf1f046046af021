"""Measure points whose values lie over several processes, started by torchrun."""

from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from pkm_triton.distributed import traffic
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.measure.timing import measure_rank
from pkm_triton.perf.measure.workload import OwnMemory, Workload
from pkm_triton.perf.records.points import Point
from pkm_triton.perf.records.sweep_row import RowFile

from .run import Limits, open_points, progress_of, reason_to_skip, row_of


def sweep_over_ranks(
    points: Sequence[Point],
    file: RowFile,
    limits: Limits,
    ranks: Ranks,
    *,
    retry: bool = False,
    seed: int = 0,
) -> int:
    """As `run_sweep`, by ranks that go through the points together; the first adds the rows.

    A point of P ranks is measured by the first P, while the others wait. What goes wrong on a rank
    ends them all; the same command goes on.

    Raises:
        ValueError: if a point needs more ranks than there are.
    """
    most = max(point.ranks for point in points)
    if most > ranks.count:
        raise ValueError(
            f"ranks: {most} need as many processes, but there are {ranks.count}: torchrun "
            f"--nproc-per-node {most} -m pkm_triton.perf sweep --ranks ..."
        )
    kind = points[0].device
    # Every rank takes part in making every group.
    meshes = {
        count: DeviceMesh(kind, torch.arange(count))
        for count in sorted({point.ranks for point in points} - {1})
    }
    todo = open_points(points, file, limits, seed, retry)
    progress = progress_of(len(todo)) if ranks.rank == 0 else lambda *_: None
    measured = 0
    for point in points:
        # The first rank's file decides.
        if not ranks.any(point in todo):
            continue
        measured += 1
        progress(point.label(), 0)
        reason = reason_to_skip(point, file.rows, limits)
        if ranks.any(reason is not None):
            outcome = {"status": f"skipped: {reason}"}
        elif ranks.rank < point.ranks:
            outcome = _measure(point, meshes.get(point.ranks), limits, seed)
        else:
            outcome = {}
        if ranks.rank == 0:
            file.add(row_of(point, outcome, limits, seed))
        progress(point.label(), 1)
        ranks.wait()
    return measured


def _measure(
    point: Point, mesh: DeviceMesh | None, limits: Limits, seed: int
) -> dict[str, float | str]:
    torch.set_num_threads(point.threads)
    workload = Workload(point, seed=seed, mesh=mesh)
    workload.warm_up()

    def agree(number: float) -> float:
        if mesh is None:
            return number
        told = torch.tensor([number], dtype=torch.float64, device=point.device)
        distributed.broadcast(told, 0, group=mesh.get_group())
        return told.item()

    figures = measure_rank(point, workload, seconds=limits.seconds, agree=agree)
    return figures | {"sent_bytes": float(_sent(point, workload.memory))}


def _sent(point: Point, memory: nn.Module) -> int:
    """What the first rank sends in a pass, by formula."""
    if point.ranks == 1:
        return 0
    assert isinstance(memory, OwnMemory)
    told = traffic(memory, point.tokens, point.ranks, point.layout, equal_tokens=True)  # pyright: ignore[reportArgumentType]
    return told.sent(0, None if point.backward else "forward")
