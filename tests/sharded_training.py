"""What ranks run with sharded memories, and what one process does instead; imported by both."""

import functools

import torch
from tolerance import assert_close_to_oracle
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import pkm_triton as pkm
from pkm_triton.distributed import shard_memory
from pkm_triton.optim import SparseAdam, clip_grad_norm_

FORMS = [False, True, "factored"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SIZES = {"heads": 2, "top_k": 3, "query_dim": 4, "query_norm": "layer"}


def layouts(ranks):
    """Layouts over so many ranks, each with the shape of its mesh."""
    found = {"columns": (ranks,), "rows": (ranks,), "replicate": (ranks,)}
    return found | (
        {("rows", "columns"): (2, 2), ("columns", "rows"): (2, 2)} if ranks == 4 else {}
    )


def make_model(form=False, dtype=torch.float32, value_dim=7, num_subkeys=5):
    """Two memories of one table, of which neither K = 25 nor d_v = 7 divides by ranks."""
    torch.manual_seed(1)
    memories = [
        pkm.ProductKeyMemory(
            8, value_dim, num_subkeys=num_subkeys, sparse_grad=form, output="linear", **SIZES
        )
        for _ in range(2)
    ]
    memories[1].values = memories[0].values
    return nn.Sequential(nn.Linear(8, 8), memories[0], nn.Tanh(), memories[1]).to(dtype)


def batches(ranks, step, dtype, equal=False):
    """The tokens of each rank in a step: unequally many, and once none."""
    seed = torch.Generator().manual_seed(step)
    counts = [4 if equal else (3 + 2 * rank + step) % 6 for rank in range(ranks)]
    return [
        torch.randn(count, 8, generator=seed, dtype=torch.float64).to(dtype) for count in counts
    ]


def loss(model, x):
    """The mean over tokens; of none, zero."""
    return model(x).square().sum() / max(1, x.shape[0])


def train_alone(model, ranks, steps, optimiser, dtype):
    """What the ranks shall do, by one process with all their tokens."""
    norms, outputs = [], []
    for step in range(steps):
        optimiser.zero_grad()
        for half in range(2):
            own = next(model.parameters()).dtype
            parts = [x.to(own) for x in batches(ranks, 2 * step + half, dtype)]
            outputs.append([model(x).detach() for x in parts])
            (sum(loss(model, x) for x in parts) / ranks).backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.5))
        optimiser.step()
    return norms, outputs


def train(model, rank, ranks, steps, optimiser, dtype):
    """One rank's part of it."""
    norms, outputs = [], []
    rest = [p for p in model.parameters() if p not in pkm.distributed.sharded_values(model)]
    rest = [p for p in rest if p is not model[1].values]
    for step in range(steps):
        optimiser.zero_grad()
        for half in range(2):
            x = batches(ranks, 2 * step + half, dtype)[rank].to(device())
            with torch.no_grad():
                outputs.append(model(x).cpu())
            loss(model, x).backward()
        pkm.distributed.average_gradients(rest)
        norms.append(clip_grad_norm_(model.parameters(), 0.5).cpu())
        optimiser.step()
    return norms, outputs


def whole(tensor):
    """All of a tensor, however it lies over ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def parameters(model):
    """All of them, whole, by name."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def sharded(form, dtype, layout, shape, rank, **options):
    """A model whose memories are spread; ranks do not start from the same table."""
    model = make_model(form, dtype).to(device())
    with torch.no_grad():
        model[1].values.add_(rank)
    return shard_memory(model, make_mesh(shape), layout, **options)


def device():
    """Where the ranks of this process group compute."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def make_mesh(shape):
    """A mesh of all ranks."""
    return init_device_mesh(device(), shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def run_training(rank, ranks, folder, dtypes):
    """Every layout with every form and dtype."""
    for layout, shape in layouts(ranks).items():
        for form in FORMS:
            for dtype in dtypes:
                model = sharded(form, dtype, layout, shape, rank)
                optimiser = SparseAdam(model.parameters(), lr=0.01, rounding="master")
                made = train(model, rank, ranks, 3, optimiser, dtype)
                record = (*made, parameters(model), type(model[1].values.grad).__name__)
                torch.save(record, f"{folder}/{layout}-{form}-{dtype}-{rank}.pt")


def _said(wrong):
    try:
        wrong()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"


OPTIMISERS = {
    "sparse": (True, torch.optim.SparseAdam, {}),
    "Adam": ("factored", torch.optim.Adam, {}),
    "foreach": (False, torch.optim.AdamW, {"foreach": True}),
    "plain": (False, torch.optim.AdamW, {}),
}


def _step(form, kind, options):
    model = sharded(form, torch.float32, "columns", (2,), 0)
    loss(model, torch.ones(3, 8)).backward()
    values = [model[1].values]
    kind(values if kind is torch.optim.SparseAdam else model.parameters(), **options).step()


def run_refused(rank, folder):
    """What is wrong on all ranks, or on one."""
    mesh = make_mesh((2,))
    done = sharded(False, torch.float32, "columns", (2,), 0)
    experts = nn.Sequential(pkm.ProductKeyExperts(8, num_subkeys=5, **SIZES))
    narrow = make_model(value_dim=1)
    meshes, three = [mesh, make_mesh((2, 1))], init_device_mesh("cpu", (2, 1, 1))
    layer = done[1]
    slots, weights = torch.zeros(3, 6 + rank, dtype=torch.int32), torch.ones(3, 6 + rank)
    dtype = [torch.float32, torch.bfloat16][rank]

    def records():
        with torch.set_grad_enabled(rank == 0):
            done(torch.ones(2, 8))

    pool = nn.ModuleList([make_model()[1], make_model()[1]])
    pkm.share_values(pool)
    pair = [make_model()[1], make_model()[1]]
    pair[1].values = pair[0].values
    shard_memory(pair[0], mesh)
    wrong = {
        "part of a pool": lambda: shard_memory(pool[1], mesh, "rows"),
        "spread already": lambda: shard_memory(pair[1], mesh, "rows"),
        "group": lambda: pkm.distributed.average_gradients(done.parameters(), "x"),
        "group of a file": lambda: pkm.save_with_memory(done, f"{folder}/x.pt", "x"),
        "group of usage": lambda: pkm.MemoryUsage(layer.num_slots).all_reduce("x"),
        "layout": lambda: shard_memory(make_model(), mesh, "diagonal"),
        "dimensions": lambda: shard_memory(make_model(), mesh, ("rows", "columns")),
        "none": lambda: shard_memory(nn.Linear(2, 2), mesh),
        "too many": lambda: shard_memory(narrow, mesh),
        "again": lambda: shard_memory(done, mesh),
        "experts": lambda: shard_memory(experts, mesh),
        "mesh": lambda: shard_memory(make_model(), "cpu"),
        "differ": lambda: shard_memory(make_model(value_dim=7 + rank), mesh),
        "one rank": lambda: shard_memory(make_model(), mesh, ["rows", "diagonal"][rank]),
        "reads": lambda: layer.sharding.gather(layer.values, slots, weights, False),
        "recording": records,
        "mesh of one": lambda: shard_memory(make_model(), [mesh, "cpu"][rank]),
        "shapes": lambda: shard_memory(
            make_model(), meshes[rank], ["rows", ("rows", "columns")][rank]
        ),
        "flag": lambda: shard_memory(make_model(), mesh, equal_tokens=[True, 1][rank]),
        "forms": lambda: shard_memory(make_model([True, "factored"][rank]), mesh),
        "three": lambda: shard_memory(make_model(), three),
        "sizes": lambda: layer.sharding.gather(
            layer.values, slots[:, :6], weights[:, :6].to(dtype), False
        ),
        **{f"steps {name}": functools.partial(_step, *args) for name, args in OPTIMISERS.items()},
        "tuned": lambda: pkm.train_slots(layer, torch.zeros(1, dtype=torch.int64)),
        "sharing": lambda: pkm.share_values([layer, make_model()[1]]),
    }
    torch.save({name: _said(each) for name, each in wrong.items()}, f"{folder}/refused-{rank}.pt")


def run_more(rank, ranks, folder):
    """What is compared within a rank."""
    _compiled(rank, ranks)
    _drawn()
    _wrapped(rank, ranks)
    _mixed(rank, ranks)
    _narrow(rank, ranks)
    _averaged(rank)
    _rounded(ranks)


def _rounded(ranks):
    """Shards of one table draw random numbers of their own."""
    for layout in ("columns", "rows"):
        model = make_model(False, torch.bfloat16, value_dim=8, num_subkeys=4)
        values = shard_memory(model, make_mesh((ranks,)), layout)[1].values
        with torch.no_grad():
            values.fill_(1)
        values.grad = torch.ones_like(values)
        SparseAdam([values], rounding="stochastic").step()
        first, second = values.full_tensor().chunk(2, dim=int(layout == "columns"))
        assert first.unique().numel() == 2
        assert not torch.equal(first, second)


def _averaged(rank):
    """Gradients stay over the ranks of a table's mesh; over ranks of other meshes: means."""
    x = torch.linspace(-1, 1, 24).view(3, 8)
    for form in FORMS:
        model = sharded(form, torch.float32, "columns", (2,), rank)
        loss(model, x * (rank + 1)).backward()
        before = dense_grad(model).clone()
        pkm.distributed.average_gradients(model[1].values)
        assert torch.equal(dense_grad(model), before)

        mesh = make_mesh((2, 1))
        model = shard_memory(make_model(form), mesh["inner"], "columns")
        loss(model, x * (rank + 1)).backward()
        pkm.distributed.average_gradients(model[1].values, mesh["outer"].get_group())
        alone = make_model(form)
        (loss(alone, x) / 2 + loss(alone, x * 2) / 2).backward()
        torch.testing.assert_close(dense_grad(model), dense_grad(alone))


def dense_grad(model):
    """What this rank has of the table's gradient, dense."""
    grad = model[1].values.grad
    return (grad.to_local() if hasattr(grad, "to_local") else grad).to_dense()


def _compiled(rank, ranks):
    for layout in ("columns", "rows"):
        model = sharded(False, torch.float32, layout, (ranks,), rank, equal_tokens=True)
        x = batches(ranks, 0, torch.float32, equal=True)[rank]
        grads = []
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            loss(run, x).backward()
            grads.append({name: whole(p.grad) for name, p in model.named_parameters()})
        torch.testing.assert_close(grads[1], grads[0])


def _drawn():
    """Values drawn after the table was spread without data."""
    tables = []
    for layout in ("columns", "rows"):
        with torch.device("meta"):
            model = make_model(num_subkeys=40)
        shard_memory(model, make_mesh((2,)), layout)
        assert model[1].values.to_local().is_meta
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        model[1].reset_parameters()
        tables.append(whole(model[1].values))
    assert torch.equal(*tables)
    deviation = 7**-0.5
    assert 0.95 * deviation < tables[0].std() < 1.05 * deviation
    halves = tables[0].chunk(2)
    assert not torch.equal(halves[0], halves[1])


def _wrapped(rank, ranks):
    """The rest under DistributedDataParallel and FSDP2, 20 steps."""
    mesh = make_mesh((ranks,))
    for form, layout in zip(FORMS, ("columns", "rows", "replicate"), strict=True):
        for wrap in ("ddp", "fsdp"):
            model = sharded(form, torch.float32, layout, (ranks,), rank)
            if wrap == "ddp":
                run = pkm.distributed.data_parallel(model)
            else:
                pkm.distributed.fully_shard(model[1], mesh=mesh)
                run = pkm.distributed.fully_shard(model, mesh=mesh)
            alone = [make_model(form), make_model(form).double()]
            pairs = [(net, SparseAdam(net.parameters(), lr=0.01)) for net in (*alone, model)]
            for step in range(20):
                parts = [x + 0.1 for x in batches(ranks, step, torch.float32, equal=True)]
                for net in alone:
                    own = next(net.parameters()).dtype
                    sum(loss(net, x.to(own)) / ranks for x in parts).backward()
                loss(run, parts[rank]).backward()
                for net, optimiser in pairs:
                    clip_grad_norm_(net.parameters(), 1.0)
                    optimiser.step()
                    optimiser.zero_grad()
            same, oracle = (dict(net.named_parameters()) for net in alone)
            for name, parameter in parameters(model).items():
                assert_close_to_oracle(parameter, oracle[name].detach(), same[name].detach())


def _mixed(rank, ranks):
    """Mixed precision casts the rest, not the table; what comes out is of the rest's dtype."""
    mesh = make_mesh((ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = batches(ranks, 0, torch.float32, equal=True)[rank]
    expected = make_model()(x)
    for form in FORMS:
        model = sharded(form, torch.float32, "columns", (ranks,), 0)
        out = pkm.distributed.fully_shard(model, mesh=mesh, mp_policy=policy)(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
        out.float().square().mean().backward()
        values = model[1].values
        assert values.dtype == values.to_local().dtype == values.grad.dtype == torch.float32
        assert dense_grad(model).count_nonzero() > 0


def _narrow(rank, ranks):
    """Weights in bfloat16 on the way: an error of 2^-9 at most."""
    x = batches(ranks, 0, torch.float32)[rank]
    wide = sharded(False, torch.float32, "columns", (ranks,), 0)
    narrow = sharded(False, torch.float32, "columns", (ranks,), 0, narrow_weights=True)
    for layer, half in ((wide[1], narrow[1]),):
        weights, slots = layer.lookup(x)
        exact = layer.sharding.gather(layer.values, slots, weights, False)
        rounded = half.sharding.gather(half.values, slots, weights, False)
        largest = whole(layer.values).abs().max() * layer.heads
        if x.shape[0]:
            assert 0 < (exact - rounded).abs().max() <= largest * 2**-9
