import ast
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[2] / "perf"
BELOW = {
    "sweep": {"report", "measure", "records"},
    "op": {"check", "measure", "records"},
    "check": {"measure", "records"},
    "studies": {"report", "measure", "records"},
    "report": {"measure", "records"},
    "measure": {"records"},
    "compiled": {"records"},
    "records": set(),
}


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PERF.glob("*/__init__.py")}
    assert folders == set(BELOW)


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder):
    for path in sorted((PERF / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            assert node.level < 2, f"{path.name} line {node.lineno}"
            if node.level == 0 and (node.module or "").startswith("pkm_triton.perf"):
                # `from pkm_triton.perf import x` and `from pkm_triton.perf.x import y`.
                parts = (node.module or "").split(".")[2:3]
                found = parts or [alias.name for alias in node.names]
                assert set(found) <= BELOW[folder], f"{path.name} line {node.lineno}"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_help_is_there_at_once(arguments):
    """It waits for no library: each command imports what it needs."""
    code = (
        "import sys\n"
        "from pkm_triton.perf.__main__ import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('imported', {'torch', 'triton', 'pandas', 'matplotlib'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "imported set()" in done.stdout
    assert "sweep" in done.stdout + done.stderr
