"""The most memory of a rank, beside its bound: shard, gradient, state and working memory."""

import functools

import torch
from sharded_training import FORMS, layouts, make_mesh

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient, local
from pkm_triton.optim import SparseAdam
from pkm_triton.perf.measure.memory import measure_peak

TOKENS, WIDTH, READS = 2000, 256, 16


def make_layer(form, num_subkeys):
    return pkm.ProductKeyMemory(
        16, WIDTH, num_subkeys=num_subkeys, heads=2, top_k=READS // 2, query_dim=8,
        query_norm="layer", sparse_grad=form,
    )  # fmt: skip


def run_memory(rank, ranks):
    """Every layout and form: a forward pass, a backward pass, and a first step."""
    for layout, shape in layouts(ranks).items():
        if layout == "replicate":
            continue
        for form in FORMS:
            torch.manual_seed(0)
            layer = make_layer(form, 40)
            mesh = make_mesh(shape)
            pkm.distributed.shard_memory(layer, mesh, layout, equal_tokens=True)
            _passes(layer, ranks, f"{layout}, {form}, rank {rank}")
        _drawn(layout, shape, f"{layout}, rank {rank}")


def _passes(layer, ranks, where):
    with torch.no_grad():
        weights, slots = (each.flatten(1) for each in layer.lookup(torch.randn(TOKENS, 16)))
    weights.requires_grad_()
    all_tokens = ranks * TOKENS
    bound = all_tokens * (READS * 8 + 2 * WIDTH * 4)
    grad, made = torch.ones(TOKENS, WIDTH), {}

    def forward():
        made["out"] = layer.sharding.gather(layer.values, slots, weights, layer.sparse_grad)

    def both():
        forward()
        made["out"].backward(grad)

    def kept():
        shard = local(layer.values.grad)
        if isinstance(shard, FactoredGradient):
            return [made["out"], *(x for p in shard.reads for x in vars(p).values())]
        return [made["out"], shard]

    for call, left in ((forward, tuple), (both, kept)):
        _assert_within(bound, call, lambda: _forget(layer, made), left, (where, call.__name__))
    step = SparseAdam([layer.values])
    shard = layer.values.to_local().nbytes
    stepping = measure_peak(step.step)
    assert stepping.peak_bytes <= 2 * shard + bound, where


def _forget(layer, made):
    made.clear()
    layer.values.grad = None


def _assert_within(bound, call, forget, kept, where):
    """The working memory of a call is at most that, on all ranks, which go on together."""
    found = []
    # A thread of gloo's may hold what was sent a moment longer: one of a few is without.
    for _ in range(5):
        forget()
        found.append(measure_peak(call, kept).working_bytes)
        within = torch.tensor(int(min(found) <= bound))
        torch.distributed.all_reduce(within, torch.distributed.ReduceOp.MIN)
        if within:
            break
    assert min(found) <= bound, (where, found, bound)
    return min(found)


def _drawn(layout, shape, where):
    """Nothing of full size is formed where a table is spread before it has data."""
    with torch.device("meta"):
        layer = make_layer(False, 250)
    pkm.distributed.shard_memory(layer, make_mesh(shape), layout)

    def materialise():
        layer.to_empty(device="cpu")
        layer.reset_parameters()

    peak = measure_peak(materialise).peak_bytes
    whole = layer.values.numel() * 4
    blocks = 3 * 4 * pkm.distributed.sharding.BLOCK_ELEMENTS
    assert peak <= layer.values.to_local().nbytes + blocks < whole, where


def run_plan(rank, ranks):
    """A first training step, beside what `plan` tells of it."""
    compared = 0
    for layout, shape in layouts(ranks).items():
        for form in FORMS:
            torch.manual_seed(0)
            layer = make_layer(form, 120)
            planned = pkm.distributed.plan(
                layer.num_slots, WIDTH, SparseAdam, ranks, 1e12, tokens=TOKENS, reads=READS,
                dtype=torch.float32, sparse_grad=form,
            )  # fmt: skip
            pkm.distributed.shard_memory(layer, make_mesh(shape), layout, equal_tokens=True)
            optimiser = SparseAdam([layer.values])
            with torch.no_grad():
                weights, slots = (each.flatten(1) for each in layer.lookup(torch.randn(TOKENS, 16)))
            grad = torch.ones(TOKENS, WIDTH)

            weights.requires_grad_()
            args = layer.values, slots, weights, layer.sparse_grad

            def both(gather=layer.sharding.gather, args=args, grad=grad):
                gather(*args).backward(grad)

            both()
            optimiser.step()
            for told in planned.layouts:
                if (told.layout, told.ranks) != (layout, shape if len(shape) == 2 else ranks):
                    continue
                where = f"{layout}, {form}, rank {rank}"
                kept = optimiser.state[layer.values]
                states = [local(each) for name, each in kept.items() if name != "step"]
                assert sum(state.nbytes for state in states) == told.state_bytes, where
                most = told.gradient_bytes + told.working_bytes
                peak = _assert_within(
                    most, both, functools.partial(_forget, layer, {}), tuple, where
                )
                assert peak >= most / 3, (where, peak, most)
                assert local(layer.values).nbytes <= told.parameter_bytes, where
                compared += 1
    assert compared == 3 * len(layouts(ranks)) - 3
