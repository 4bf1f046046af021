"""What ranks save and load of sharded memories; imported by their processes."""

import os
import signal

import torch
import torch.distributed.checkpoint as dcp
from sharded_training import make_mesh, make_model, train, whole
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._pytree import tree_map

from pkm_triton.distributed import latest_checkpoint, new_checkpoint, shard_memory
from pkm_triton.optim import SparseAdam
from pkm_triton.perf.measure.memory import measure_peak

# How a table is trained, and lies over four ranks: form of gradient, dtype, layout, mesh.
CASES = {
    "dense": (False, torch.float32, "columns", (4,)),
    "sparse": (True, torch.float64, ("rows", "columns"), (2, 2)),
    "factored": ("factored", torch.bfloat16, "columns", (4,)),
}
SLACK = 1 << 18  # bytes of all but tables


class Both:
    """SparseAdam for the table, in its fused step too, and Adam for the rest, as one."""

    def __init__(self, model):
        values = model[1].values
        self.parts = [
            SparseAdam([values], lr=0.01, rounding="master"),
            torch.optim.Adam([p for p in model.parameters() if p is not values], lr=0.01),
        ]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def state_of(model, optimiser):
    """What is saved, and loaded into."""
    parameters, states = get_state_dict(model, optimiser.parts)
    return {"model": parameters, "optimisers": states}


def load(model, optimiser, path, **options):
    """Load a checkpoint; all that a model and its optimisers hold."""
    for part in optimiser.parts:
        if isinstance(part, SparseAdam):
            part.init_state()
    state = state_of(model, optimiser)
    dcp.load(state, checkpoint_id=path, **options)
    set_state_dict(
        model,
        optimiser.parts,
        model_state_dict=state["model"],
        optim_state_dict=state["optimisers"],
    )


def contents(model, optimiser):
    """All that was saved, whole."""
    return tree_map(
        lambda x: whole(x) if isinstance(x, torch.Tensor) else x, state_of(model, optimiser)
    )


def zeroed(form, dtype):
    """A model whose parameters are known to be others than those saved."""
    model = make_model(form, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def run_save(rank, ranks, folder):
    """Train, and save."""
    for name, (form, dtype, layout, shape) in CASES.items():
        model = shard_memory(make_model(form, dtype), make_mesh(shape), layout)
        optimiser = Both(model)
        train(model, rank, ranks, 1, optimiser, dtype)
        dcp.save(state_of(model, optimiser), checkpoint_id=f"{folder}/{name}")
        saved = contents(model, optimiser)
        if rank == 0:
            torch.save(saved, f"{folder}/{name}.saved")


def run_load(rank, ranks, folder):
    """Load it as rows."""
    for name, (form, dtype, *_) in CASES.items():
        model = shard_memory(zeroed(form, dtype), make_mesh((ranks,)), "rows")
        optimiser = Both(model)
        load(model, optimiser, f"{folder}/{name}")
        loaded = contents(model, optimiser)
        if rank == 0:
            torch.save(loaded, f"{folder}/{name}.loaded")


def large(ranks, layout):
    """A sharded model that is nearly all table, of which no rank ever has all; and its bytes."""
    with torch.device("meta"):
        model = make_model("factored", torch.bfloat16, value_dim=32, num_subkeys=256)
    shard_memory(model, make_mesh((ranks,)), layout)
    model.to_empty(device="cpu")
    for module in model:
        getattr(module, "reset_parameters", lambda: None)()
    return model, 4 * model[1].values.numel()


def run_save_large(rank, ranks, folder):
    """Saving takes nothing that grows with the table."""
    model, _ = large(ranks, "columns")
    optimiser = Both(model)
    train(model, rank, ranks, 1, optimiser, torch.bfloat16)
    optimiser.zero_grad()
    state = state_of(model, optimiser)
    peak = measure_peak(lambda: dcp.save(state, checkpoint_id=f"{folder}/large"))
    assert peak.peak_bytes < SLACK, peak


def run_load_large(rank, ranks, folder):
    """Loading takes this rank's states, and two of the saved shards at a time."""
    model, table = large(ranks, "rows")
    optimiser = Both(model)
    shard, saved_shard = table / ranks, table / 4
    peak = measure_peak(optimiser.parts[0].init_state)
    assert peak.peak_bytes < 3 * shard + SLACK, peak  # two moments and the master, all float32
    peak = measure_peak(lambda: load(model, optimiser, f"{folder}/large"))
    assert peak.peak_bytes < 2 * saved_shard + SLACK, peak


class Killed(dcp.FileSystemWriter):
    """Kills this process when it has written its part, before the checkpoint is complete."""

    def write_data(self, *given):
        super().write_data(*given).wait()
        os.kill(os.getpid(), signal.SIGKILL)


def run_killed(rank, ranks, folder):
    """Two saves, of which one rank does not live to see the end of the second."""
    model = shard_memory(make_model(), make_mesh((ranks,)), "columns")
    for number in range(3):
        torch.nn.init.constant_(model[1].values, number)
        path = new_checkpoint(f"{folder}/saves")
        if number < 2:
            dcp.save({"model": model.state_dict()}, checkpoint_id=path)
            assert latest_checkpoint(f"{folder}/saves") == path
    assert os.listdir(f"{folder}/saves") == ["000002"]
    distributed.barrier()
    writer = Killed(path) if rank == 1 else dcp.FileSystemWriter(path)
    try:
        dcp.save({"model": model.state_dict()}, storage_writer=writer)
    except Exception:
        assert os.path.exists(path)
        os._exit(0)


def run_after_killed(rank, ranks, folder):
    """The old one is there, and the next save clears the other away."""
    model = shard_memory(make_model(), make_mesh((ranks,)), "rows")
    path = latest_checkpoint(f"{folder}/saves")
    dcp.load({"model": model.state_dict()}, checkpoint_id=path)
    assert (whole(model[1].values) == 1).all()
    assert new_checkpoint(f"{folder}/saves").name == "000004"
    assert os.listdir(f"{folder}/saves") == ["000002"]
