"""What ranks do with one file of a sharded model; imported by their processes."""

import os
import signal
from pathlib import Path

import torch
from sharded_checkpoints import SLACK, large, zeroed
from sharded_training import make_mesh, make_model, sharded, whole
from torch import distributed
from torch.distributed.fsdp import fully_shard

import pkm_triton as pkm
from pkm_triton.distributed import one_file, shard_memory, sharded_values
from pkm_triton.perf.measure.memory import measure_peak

CASES = {"columns": torch.bfloat16, "rows": torch.float32}


def wrapped(model, ranks):
    """A sharded model with the rest under FSDP2."""
    mesh = make_mesh((ranks,))
    return fully_shard(model, mesh=mesh, ignored_params=sharded_values(model))


def state(model):
    """All of it, whole."""
    return {name: whole(part) for name, part in model.state_dict().items()}


def run_save(rank, ranks, folder):
    """Of each layout one file; rank 0 alone writes."""
    one_file.BLOCK_BYTES = 100  # a few rows
    for layout, dtype in CASES.items():
        model = wrapped(sharded(False, dtype, layout, (ranks,), rank), ranks)
        mine = Path(folder, f"{layout}.pt")
        pkm.save_with_memory(model, mine)
        everything = state(model)
        if rank == 0:
            torch.save(everything, f"{folder}/{layout}.expected")
    mesh = make_mesh((2, 2))
    model = shard_memory(make_model(), mesh["inner"], "columns")
    pkm.save_with_memory(model, Path(folder, "copies.pt"))


def run_load(rank, ranks, folder):
    """What one process has written, and what was written in the other layout."""
    one_file.BLOCK_BYTES = 100
    for layout, other in (("columns", "rows"), ("rows", "columns")):
        for name in (f"{layout}.pt", f"{layout}.whole"):
            model = shard_memory(zeroed(False, CASES[layout]), make_mesh((ranks,)), other)
            model = wrapped(model, ranks)
            assert pkm.load_with_memory(model, f"{folder}/{name}") is model
            loaded, expected = state(model), torch.load(f"{folder}/{layout}.expected")
            assert loaded.keys() == expected.keys()
            for key in expected:
                assert torch.equal(loaded[key], expected[key]), (name, key)


def run_large(rank, ranks, folder):
    """Neither way takes memory that grows with the table, but to map the file."""
    one_file.BLOCK_BYTES = SLACK // 8
    model, _ = large(ranks, "rows")
    path = Path(folder, "large.pt")
    peak = measure_peak(lambda: pkm.save_with_memory(model, path)).peak_bytes
    mapped = path.stat().st_size
    assert mapped > 8 * SLACK
    assert peak < 2 * SLACK + (mapped if rank == 0 else 0), peak
    other, _ = large(ranks, "columns")
    peak = measure_peak(lambda: pkm.load_with_memory(other, path)).peak_bytes
    assert peak < 2 * SLACK + mapped, peak
    assert torch.equal(whole(model[1].values), whole(other[1].values))


def _said(wrong):
    try:
        wrong()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run_refused(rank, ranks, folder):
    """What is wrong on one rank ends the others too; then the rank that writes is killed."""
    path = Path(folder, "model.pt")
    model = shard_memory(make_model(), make_mesh((ranks,)), "columns")
    pkm.save_with_memory(model, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    def on_a_full_disk():
        fallocate, os.posix_fallocate = os.posix_fallocate, full
        try:
            pkm.save_with_memory(model, path)
        finally:
            os.posix_fallocate = fallocate

    half = distributed.new_subgroups_by_enumeration([[0], [1]])[0]
    damaged = Path(folder, "damaged.pt")
    a_row = whole(model[1].values)[20].numpy().tobytes()
    assert before.count(a_row) == 1
    damaged.write_bytes(before.replace(a_row, a_row[::-1]))
    mine = Path(folder, f"mine-{rank}.pt")
    said = {
        "full": _said(on_a_full_disk),
        "differ": _said(lambda: pkm.save_with_memory(model, mine)),
        "group": _said(lambda: pkm.save_with_memory(model, path, half)),
        "name": _said(lambda: pkm.save_with_memory(model, path if rank else "m.safetensors")),
        "gone": _said(lambda: pkm.load_with_memory(model, path if rank else mine)),
        "other": _said(lambda: pkm.load_with_memory(sharded_wider(ranks), path)),
        "damaged": _said(lambda: pkm.load_with_memory(model, damaged)),
    }
    torch.save(said, f"{folder}/said-{rank}.pt")
    assert path.read_bytes() == before
    distributed.barrier()
    if rank == 0:
        torch.nn.init.zeros_(model[0].bias)
        one_file._send_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        pkm.save_with_memory(model, path)
    except Exception:
        assert path.read_bytes() == before
        os._exit(0)


def sharded_wider(ranks):
    """A model of other sizes."""
    return shard_memory(make_model(value_dim=9), make_mesh((ranks,)), "columns")
