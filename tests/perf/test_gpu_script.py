"""`.ci/gpu`, as it runs where nothing is installed but torch and triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Without the site's packages, of which this project may be one. The parts after the first take
# minutes.
PYTHON = """#!/bin/sh
case "$*" in
  *"check --no-speed"*) exec {python} -S -W ignore "$@" ;;
esac
echo "$@"
exit 124
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="would prove the machine at hand")
def test_it_finds_the_project_and_says_what_failed(tmp_path):
    pytest.importorskip("triton")
    python = tmp_path / "python3"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    environment["PYTHONPATH"] = str(Path(torch.__file__).parents[1])
    done = subprocess.run(
        [ROOT / ".ci/gpu", tmp_path / "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "device: no GPU" in (tmp_path / "out/numerics.txt").read_text(), done.stdout
    status = (tmp_path / "out/status").read_text()
    assert status == "numerics 2\nspeed 124\nsweep 124\nkernels 124\n"
    assert f"--output {tmp_path}/out/sweep" in done.stdout
