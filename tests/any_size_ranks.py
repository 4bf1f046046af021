"""Tables of any size over ranks: a gather and its gradients, beside the oracle's."""

import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_training import FORMS, make_mesh
from torch import distributed, nn
from torch.distributed.tensor import distribute_tensor

from pkm_triton.distributed.layouts import check_parts
from pkm_triton.distributed.sharding import Sharding

LAYOUTS = {
    2: {("columns",): (2,), ("rows",): (2,)},
    4: {("columns",): (4,), ("rows",): (4,), ("rows", "columns"): (2, 2)}
    | {("columns", "rows"): (2, 2)},
}


def run_any_size(rank, ranks, cases):
    """Ranks draw the same cases, for nothing in them is random."""
    meshes = {shape: make_mesh(shape) for shape in set(LAYOUTS[ranks].values())}

    @settings(max_examples=cases, derandomize=True, database=None, deadline=None)
    @given(st.data())
    def check(data):
        error = None
        try:
            _check(data, rank, ranks, meshes)
        except AssertionError as raised:
            error = raised
        # All fail together, and so look for a smaller case together.
        right = torch.tensor(int(error is None))
        distributed.all_reduce(right, distributed.ReduceOp.MIN)
        assert right, f"rank {rank}: {error}"

    check()


def _check(data, rank, ranks, meshes):
    layout = data.draw(st.sampled_from(sorted(LAYOUTS[ranks])))
    shape = LAYOUTS[ranks][layout]
    sizes = [data.draw(st.integers(1, 23)) for _ in range(2)]
    try:
        check_parts("", sizes, layout, shape)
    except ValueError:
        return  # refused: a rank would have none
    reads = data.draw(st.integers(1, 5))
    equal = data.draw(st.booleans())
    counts = [data.draw(st.integers(0, 6)) for _ in range(ranks)]
    counts = counts[:1] * ranks if equal else counts
    form = data.draw(st.sampled_from(FORMS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))

    def numbers(*shape):
        """Integers, of which sums are exact in every order."""
        return torch.randint(-4, 5, shape, generator=seed).to(dtype)

    values = numbers(*sizes)
    slots = [torch.randint(sizes[0], (count, reads), generator=seed) for count in counts]
    weights = [numbers(count, reads).float() / 4 for count in counts]
    grads = [numbers(count, sizes[1]) for count in counts]

    sharding = Sharding(meshes[shape], layout, tuple(sizes), equal, False)
    table = nn.Parameter(distribute_tensor(values, meshes[shape], sharding.placements))
    mine = weights[rank].clone().requires_grad_()
    out = sharding.gather(table, slots[rank], mine, form)
    out.backward(grads[rank])
    where = layout, sizes, counts, form, dtype
    assert torch.equal(out, oracle.gather(values, slots[rank], weights[rank]).to(dtype)), where
    assert torch.equal(mine.grad, oracle.sample(values, slots[rank], grads[rank]).float()), where
    # The mean over ranks of what each has put into the table.
    (low, high), (left, right) = (
        sharding.cut.rows[sharding.row_part],
        sharding.cut.columns[sharding.column_part],
    )
    every = torch.cat(slots), torch.cat(weights) / ranks, torch.cat(grads)
    expected = oracle.scatter(*every, sizes[0])[low:high, left:right].to(dtype)
    assert torch.equal(table.grad.to_local().to_dense(), expected), where
    if form is True:
        read = every[0].unique()
        read = read[(read >= low) & (read < high)] - low
        assert table.grad.to_local().coalesce().indices()[0].tolist() == read.tolist(), where
