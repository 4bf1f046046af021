"""The pages of docs/: they build without a dead link, their code runs, their tables are true."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pkm_triton as pkm

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def build(root, folder):
    """Build the pages of a checkout; every warning is an error."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_builds_without_a_dead_link(tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed)
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    sharded = (tmp_path / "site" / "sharded" / "index.html").read_text()
    assert "def spread" in re.sub("<[^>]*>", "", sharded)
    for name in pkm.__all__:
        if not isinstance(getattr(pkm, name), ModuleType):
            assert re.search(rf'id="pkm_triton\.[\w.]*\b{name}"', api), name


@pytest.mark.slow
@pytest.mark.parametrize("dead", ["[x](nowhere.md)", "[x](sizes.md#nowhere)", "![x](no.svg)"])
def test_a_dead_link_is_found(dead, tmp_path):
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("README.md", "mkdocs.yml", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "api.md").write_text(f"# API\n\n{dead}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "no" in done.stderr


def test_what_pages_take_in_is_there():
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("--8"):
                told = re.fullmatch(r'--8<-- "([^:"]+)(?::([^"]+))?"', line)
                assert told, f"{page.name}: {line}"
                text = (ROOT / told[1]).read_text()
                assert not told[2] or f"[start:{told[2]}]" in text, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "transformers" in block:
            pytest.importorskip("transformers")
        exec(compile(block, str(page), "exec"), names)


def table(page, heading):
    """The cells of the table whose first line holds `heading`, without its head."""
    text = (ROOT / "docs" / page).read_text().replace(r"\|", "")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    lines = next(block for block in blocks if heading in block[0])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_sizes_are_those_of_the_tensors():
    """Values, and of the same size: a dense gradient, and two moments in float32."""
    bytes_of_an_element = (4 + 4 + 2 * 4, 4 + 2 * 4, 2 + 2 * 4, 2)
    rows = table("sizes.md", "slots")
    assert len(rows) == 10
    for num_subkeys, slots, value_dim, *sizes in rows:
        layer = pkm.ProductKeyMemory(8, int(value_dim), num_subkeys=int(num_subkeys), device="meta")
        assert int(slots.replace(",", "")) == layer.num_slots
        for size, each in zip(sizes, bytes_of_an_element, strict=True):
            assert float(size) == pytest.approx(layer.values.numel() * each / 2**30, abs=0.006)


@pytest.mark.parametrize("world", [8, 64, 1024])
def test_the_largest_memories_are_those_of_the_plan(world):
    (row,) = [row for row in table("sizes.md", "slots, training") if row[0] == str(world)]
    master = functools.partial(pkm.optim.SparseAdam, rounding="master")
    layout, found = row[1], row[2:]
    for optimizer, (slots, parameters) in ((master, found[:2]), (None, found[2:])):
        most = pkm.distributed.plan(1, 1024, optimizer, world, 60e9).max_slots
        assert slots == f"{most:,}"
        assert parameters == f"{most * 1024 / 1e9:,.0f} G"
        best = pkm.distributed.plan(most, 1024, optimizer, world, 60e9).best
        names = (best.layout,) if isinstance(best.layout, str) else best.layout
        ranks = () if isinstance(best.ranks, int) else best.ranks
        parts = [" × ".join(map(str, each)) for each in (names, ranks) if each]
        assert ", ".join(parts) == layout


KINDS = {"dense": False, "sparse": True, "factored": "factored"}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def a_layer(kind):
    return pkm.ProductKeyMemory(
        8, num_subkeys=6, heads=2, top_k=3, query_dim=4, sparse_grad=KINDS[kind]
    )


def step(optimiser):
    def use(kind):
        layer = a_layer(kind)
        layer(X).sum().backward()
        optimiser([layer.values], lr=0.1).step()

    return use


def clip(clip_grad_norm_):
    def use(kind):
        layer = a_layer(kind)
        layer(X).sum().backward()
        clip_grad_norm_(layer.parameters(), 0.1)

    return use


def compiled(kind):
    torch.compile(a_layer(kind), backend="aot_eager", fullgraph=True)(X).sum().backward()


def checkpointed(kind):
    for reentrant in (False, True):
        layer = a_layer(kind)
        checkpoint(layer, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        pkm.optim.SparseAdam([layer.values]).step()


def accumulated(kind):
    layer = a_layer(kind)
    for _ in range(2):
        layer(X).sum().backward()
    pkm.optim.SparseAdam([layer.values]).step()


USES = {
    "`torch.optim.Adam`, `AdamW`": [step(torch.optim.Adam), step(torch.optim.AdamW)],
    "`torch.optim.SGD`": [step(torch.optim.SGD)],
    "`torch.optim.SparseAdam`": [step(torch.optim.SparseAdam)],
    "`pkm.optim.SparseAdam`": [step(pkm.optim.SparseAdam)],
    "`pkm.optim.clip_grad_norm_`": [clip(pkm.optim.clip_grad_norm_)],
    "`torch.nn.utils.clip_grad_norm_`": [clip(torch.nn.utils.clip_grad_norm_)],
    "`torch.compile(fullgraph=True)`": [compiled],
    "`torch.utils.checkpoint`, both kinds": [checkpointed],
    "several backward passes before a step": [accumulated],
}


# Of torch, where it traces a Function.
@pytest.mark.filterwarnings(r"ignore:::torch\.(_inductor|jit|_dynamo)")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", USES)
def test_what_goes_with_what(name, kind):
    rows = {
        row[0]: dict(zip(KINDS, row[1:], strict=True)) for row in table("compatibility.md", "spar")
    }
    assert set(rows) == set(USES)
    for use in USES[name]:
        if rows[name][kind] == "yes":
            use(kind)
        else:
            assert rows[name][kind] == "no"
            with pytest.raises((RuntimeError, TypeError, NotImplementedError, AttributeError)):
                use(kind)
