"""Speed on a GPU: each op as a share of what the machine was just measured to do, and beside the
best alternatives, in interleaved rounds. Launches are in the times of layers, and in no op's."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pkm_triton as pkm
from pkm_triton.perf.measure import fbgemm, roofline
from pkm_triton.perf.measure.timing import time_passes
from pkm_triton.perf.measure.workload import Pass, Workload
from pkm_triton.perf.records.points import Point

from .outcome import INFO, MEASURED, Check, Outcome
from .setting import Setting

GROUP = MEASURED
_SECONDS = 0.2


def checks(setting: Setting) -> Iterator[Check]:
    """Nothing on a CPU: `pkm-perf sweep` measures there."""
    if setting.device.type != "cuda":
        return
    tokens = 2048 if setting.quick else 16_384
    point = Point(
        num_subkeys=1024, dim=1024, value_dim=1024, query_dim=256, query_norm="layer",
        tokens=tokens, dtype="bfloat16", device="cuda",
    )  # fmt: skip
    peaks: dict[str, float] = {}
    yield Check(
        GROUP, "copy of 1 GiB, product of bfloat16", functools.partial(_peaks, setting, peaks)
    )
    for name, run in (
        ("lookup", _lookup),
        ("gather", _gather),
        ("gather and its dense gradients", functools.partial(_gather_backward, False)),
        ("gather and its sparse gradients", functools.partial(_gather_backward, True)),
        ("optimiser's step, sparse gradient", _step),
    ):
        yield Check(GROUP, f"{name}, T={tokens}", functools.partial(run, setting, point, peaks))
    for each in (tokens, 64, 1):
        for pass_name in ("forward", "forward+backward", "step"):
            layer = Point(**{**vars(point), "tokens": each, "pass_name": pass_name,
                             "sparse_grad": pass_name != "forward"})  # fmt: skip
            run = functools.partial(_layer, setting, layer)
            yield Check(GROUP, f"layer, {pass_name}, T={each}", run)


def _peaks(setting: Setting, peaks: dict[str, float], **sizes: int) -> Outcome:
    device = setting.device.type
    peaks["bytes"] = roofline.copy_bandwidth(device, sizes.get("num_bytes", 2**30))
    peaks["flops"] = roofline.product_rate(device, sizes.get("size", 8192))
    figures = {"GB/s": peaks["bytes"] / 1e9, "TFLOP/s": peaks["flops"] / 1e12}
    sheet = roofline.bandwidth(device)
    note = "" if sheet is None else f"datasheet {sheet / 1e9:,.0f} GB/s"
    return Outcome(INFO, figures=figures, note=note)


def _side_by_side(
    setting: Setting,
    ours: Pass,
    others: dict[str, Callable[[], Pass]],
    moved: float = 0.0,
    peaks: dict[str, float] | None = None,
) -> Outcome:
    """Medians of interleaved rounds; an alternative that cannot be run is told in the note."""
    notes: list[str] = []
    wait = torch.cuda.synchronize if setting.device.type == "cuda" else _no_wait
    wait()
    started = time.perf_counter()
    ours.run()
    wait()
    figures: dict[str, float] = {"first call s": time.perf_counter() - started}
    ready = {"pkm_triton": ours}
    for name, make in others.items():
        try:
            each = make()
            each.run()
            wait()
            ready[name] = each
        except Exception as error:
            notes.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
    timings = time_passes(list(ready.values()), seconds=_SECONDS, device=setting.device.type)
    medians = {name: timing.median_ms for name, timing in zip(ready, timings, strict=True)}
    figures["ms"] = own = medians.pop("pkm_triton")
    if moved:
        figures["GB/s"] = moved / own / 1e6
    if moved and peaks:
        figures["share of the copy"] = moved / (own / 1e3) / peaks["bytes"]
    for name, median in medians.items():
        figures[f"{name} / ours"] = median / own
    return Outcome(INFO, figures=figures, note="; ".join(notes))


def _no_wait() -> None:
    """On a CPU there is nothing to wait for."""


def _lookup(setting: Setting, point: Point, peaks: dict[str, float]) -> Outcome:
    query = setting.randn(point.tokens, point.heads, point.query_dim, dtype=torch.bfloat16)
    shape = (point.heads, 2, point.num_subkeys, point.query_dim // 2)
    subkeys = setting.randn(*shape, seed=1, dtype=torch.bfloat16)
    inputs = [query, subkeys]
    ours, textbook = (
        Pass(functools.partial(find, top_k=point.top_k), inputs, backward=False, queued=True)
        for find in (_lookup_scores, _textbook_lookup)
    )
    moved = roofline.lookup_bytes(point)
    outcome = _side_by_side(setting, ours, {"torch.topk": lambda: textbook}, moved, peaks)
    flops = 2.0 * point.tokens * point.heads * point.num_subkeys * point.query_dim
    outcome.figures["share of the product"] = flops / (outcome.figures["ms"] / 1e3) / peaks["flops"]
    return outcome


def _lookup_scores(query: Tensor, subkeys: Tensor, top_k: int) -> Tensor:
    return pkm.product_key_topk(query, subkeys, top_k)[0]


def _textbook_lookup(query: Tensor, subkeys: Tensor, top_k: int) -> Tensor:
    """Both codebooks' scores, the best k of each, and the best k of their k² sums."""
    halves = query.unflatten(-1, (2, -1))
    scores = torch.einsum("thpd,hpnd->thpn", halves, subkeys)
    best = scores.topk(top_k, dim=-1).values
    return (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(-2).topk(top_k, -1).values


def _reads(setting: Setting, point: Point) -> tuple[Tensor, Tensor, Tensor]:
    values = setting.randn(1, point.value_dim, dtype=torch.bfloat16)
    values = values.expand(point.num_slots, -1).contiguous()
    slots = setting.randint(point.num_slots, (point.tokens, point.heads * point.top_k))
    return values, slots, torch.rand(slots.shape, device=setting.device).bfloat16()


def _bag(values: Tensor, slots: Tensor, weights: Tensor, sparse: bool = False) -> Tensor:
    return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights, sparse=sparse)


def _gather(setting: Setting, point: Point, peaks: dict[str, float]) -> Outcome:
    inputs = _reads(setting, point)
    moved = roofline.gather_bytes(point, inputs[1].unique().numel())
    others: dict[str, Callable[[], Pass]] = {
        "embedding_bag": lambda: Pass(_bag, inputs, backward=False, queued=True)
    }
    if fbgemm.is_installed():
        values, slots, weights = inputs
        others["FBGEMM"] = lambda: Pass(
            fbgemm.make_gather(values, slots), [weights], backward=False, queued=True
        )
    ours = Pass(pkm.gather_values, inputs, backward=False, queued=True)
    return _side_by_side(setting, ours, others, moved, peaks)


def _gather_backward(
    sparse: bool, setting: Setting, point: Point, peaks: dict[str, float]
) -> Outcome:
    inputs = _reads(setting, point)
    trained = Point(**{**vars(point), "pass_name": "forward+backward", "sparse_grad": sparse})
    moved = roofline.gather_bytes(trained, inputs[1].unique().numel())
    ours: Callable[..., Tensor] = functools.partial(pkm.gather_values, sparse_grad=sparse)
    bag: Callable[..., Tensor] = functools.partial(_bag, sparse=sparse)
    return _side_by_side(
        setting,
        Pass(ours, inputs, backward=True, queued=True),
        {"embedding_bag": lambda: Pass(bag, inputs, backward=True, queued=True)},
        moved,
        peaks,
    )


class _Step(Pass):
    """An optimiser's step from the gradient of one backward pass, again and again."""

    queued = True

    def __init__(self, values: Tensor, grad: Tensor, optimiser: torch.optim.Optimizer) -> None:
        self._values, self._grad, self._optimiser = values, grad, optimiser

    def clear(self) -> None:
        self._values.grad = self._grad

    def run(self) -> None:
        self._values.grad = self._grad
        self._optimiser.step()


def _step(setting: Setting, point: Point, peaks: dict[str, float]) -> Outcome:
    values, slots, weights = _reads(setting, point)
    passes: list[Pass] = []
    kinds: tuple[Any, Any] = (pkm.optim.SparseAdam, torch.optim.SparseAdam)
    for kind in kinds:
        table = values.clone().requires_grad_()
        out = pkm.gather_values(table, slots, weights, sparse_grad=True)
        out.backward(torch.ones_like(out))
        assert table.grad is not None
        passes.append(_Step(table, table.grad.coalesce(), kind([table])))
    trained = Point(**{**vars(point), "pass_name": "step", "sparse_grad": True})
    distinct = slots.unique().numel()
    # Without what the other parameters move.
    moved = roofline.step_bytes(trained, distinct) - roofline.step_bytes(trained, 0)
    return _side_by_side(setting, passes[0], {"torch SparseAdam": lambda: passes[1]}, moved, peaks)


def _layer(setting: Setting, point: Point) -> Outcome:
    def other(implementation: str) -> Callable[[], Pass]:
        return lambda: Workload(Point(**{**vars(point), "implementation": implementation})).whole

    others = {"textbook": other("textbook")}
    if point.pass_name == "forward":
        others["textbook, compiled"] = other("textbook-compiled")
    return _side_by_side(setting, Workload(point).whole, others)
