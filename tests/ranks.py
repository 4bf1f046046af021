"""Run a script as several ranks of a gloo process group on this machine."""

import subprocess
import sys
from pathlib import Path

_START = """
import os, sys, torch, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
sys.path.append(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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
    """What each of two ranks printed; the script knows its `rank`, `folder` and these tests."""
    tests = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _START + script + _END, str(rank), str(folder), tests],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, error) in zip(ranks, printed, strict=True):
        assert rank.returncode == 0, error
    return [out for out, _ in printed]
