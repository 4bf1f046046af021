"""Run a script as several ranks of a process group on this machine."""

import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

_START = """
import os, sys, torch, torch.distributed as dist
rank, folder, ranks = int(sys.argv[1]), sys.argv[2], int(sys.argv[4])
sys.path.append(sys.argv[3])
torch.set_num_threads(1)
if sys.argv[5] == "nccl":
    torch.cuda.set_device(rank)
store = f"file://{folder}/store"
dist.init_process_group(sys.argv[5], init_method=store, rank=rank, world_size=ranks)
"""
# Gloo's threads, torn down by the interpreter in any order, abort a process now and then after all
# its work is done: so leave without tearing down.
_END = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run_two_ranks(script: str, folder: Path) -> list[str]:
    """What each of two ranks printed; see `run_ranks`."""
    return run_ranks(script, folder, 2)


def run_ranks(
    script: str, folder: Path, count: int, killed: Collection[int] = (), backend: str = "gloo"
) -> list[str]:
    """What each rank printed; the script knows its `rank`, `ranks`, `folder` and these tests.

    `killed`: those that the script kills.
    """
    tests = str(Path(__file__).parent)
    (folder / "store").unlink(missing_ok=True)  # of an earlier group
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _START + script + _END,
                str(rank),
                str(folder),
                tests,
                str(count),
                backend,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [rank.communicate(timeout=120) for rank in ranks]
    failed = [
        error
        for number, (rank, (_, error)) in enumerate(zip(ranks, printed, strict=True))
        if rank.returncode != (-signal.SIGKILL if number in killed else 0)
    ]
    # One that fails ends the others, which then say no more than that.
    assert not failed, "\n".join(failed)
    return [out for out, _ in printed]
