import ast
import os
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pkm_triton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = {"pkm_triton": "pkm_triton"} | {
    f"pkm_triton.{name}": name for name in ("kernels", "reference", "perf")
}


SWEEP = """
import sys, pkm_triton.kernels, pkm_triton.perf.__main__ as perf
print(pkm_triton.kernels.__file__)
sys.exit(perf.main(["sweep", "--preset", "quick", "--implementation", "pkm_triton",
                    "--seconds", "0.02", "--output", "out", "--grid-only", *sys.argv[1:]]))
"""


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """The absolute names and the relative levels a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "", node.level)


def test_packages_are_the_folders():
    """A sub-folder that is missing from the list would be silently absent from the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for package, folder in FOLDERS.items()
        for path in modules(folder)
        if "results" not in path.parts
    }
    assert set(project["packages"]) == found
    for folder in FOLDERS.values():
        assert (ROOT / folder / "__init__.py").exists()


@pytest.mark.slow
def test_wheel_holds_one_import_name_and_sweeps_without_the_checkout(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"pkm_triton"}
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in FOLDERS.items()
        for path in modules(folder)
    }
    assert expected <= set(names)
    assert "pkm_triton/py.typed" in names

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    sizes = "--dim 16 --tokens 8 --num-subkeys 16 --heads 2 --top-k 2 4 --keys product"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SWEEP, *sizes.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(str(tmp_path))
    assert len((tmp_path / "out" / "sweep.csv").read_text().splitlines()) > 1
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_arrows_point_down(folder):
    """kernels and reference are leaves; only ops and its backend switch know both."""
    for path in modules(folder):
        for name, level in imports(path):
            where = f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in ("kernels", "reference", "perf") or level > 0, where
            if folder in ("kernels", "reference"):
                assert not name.startswith("pkm_triton"), where
                # Inside of the folder, from its parts as well.
                assert level <= len(path.relative_to(ROOT / folder).parts), where
            if folder == "reference" and level == 0:
                assert name.split(".")[0] != "triton", where
            if folder == "pkm_triton":
                assert "perf" not in name.split("."), where


def test_version_is_stated_once_and_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pkm_triton.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(pkm_triton.__version__)}$", citation, re.MULTILINE)
    assert f"## {pkm_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    for name in pkm_triton.__all__:
        assert getattr(pkm_triton, name).__doc__, name
    assert set(pkm_triton.__all__) <= set(dir(pkm_triton))
    lazy = [name for names in pkm_triton._MODULES.values() for name in names]
    assert sorted(lazy) == sorted(pkm_triton.__all__)
    # Importing a module sets the attribute of its name: a function of that name would be hidden.
    modules_ = {path.stem for path in (ROOT / "pkm_triton").glob("*.py")}
    assert not modules_ & (set(lazy) - set(pkm_triton._MODULES[""]))
    with pytest.raises(AttributeError, match="has no attribute 'gather_vaules'"):
        _ = pkm_triton.gather_vaules


@pytest.mark.parametrize(
    "code",
    [
        "from pkm_triton import optim, gather_values",
        "from pkm_triton import *; gather_values, optim.SparseAdam",
        "import pkm_triton; pkm_triton.optim.SparseAdam, pkm_triton.ProductKeyMemory",
        "import pkm_triton.ops, torch; torch.ops.pkm_triton.gather_values",
        "import pkm_triton.transformer; pkm_triton.transformer.Transformer, pkm_triton.backend()",
    ],
)
def test_names_are_found_in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_works_without_triton_and_numpy():
    code = BLOCK + (
        "import torch, pkm_triton as pkm\n"
        "layer = pkm.ProductKeyMemory(8, num_subkeys=6, heads=2, top_k=3, query_dim=4)\n"
        "layer(torch.randn(5, 8)).sum().backward()\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.slow
def test_import_is_quick_and_leaves_triton_alone():
    """Under 0.5 s beyond `import torch`."""
    code = (
        "import time, sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "start = time.perf_counter()\n"
        "import pkm_triton\n"
        "pkm_triton.ProductKeyMemory\n"
        "print(time.perf_counter() - start)\n"
        "assert before or 'triton' not in sys.modules\n"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert statistics.median(seconds) < 0.5
