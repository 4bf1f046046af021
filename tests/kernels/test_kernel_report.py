"""The compiler's work stays within limits, without a GPU: no spill, no atomics, wide accesses."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from pkm_triton.kernels import chip
from pkm_triton.kernels.chip import CHIPS, as_if
from pkm_triton.kernels.launches import recorded_launches
from pkm_triton.perf.compiled.kernel_report import architecture_here
from pkm_triton.perf.compiled.launches import shipped_configurations

# Of triton 3.9. What the compilers before it make only has to fit the chip: they spill more.
LIMITS = json.loads((Path(__file__).parent / "kernel_limits.json").read_text())
OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
REPORT = """
import json, sys
from pkm_triton.perf.compiled import kernel_report
if __name__ == "__main__":
    rows = list(kernel_report.report([sys.argv[1]], sys.argv[2], processes=1))
    print(json.dumps(rows))
"""


def compile_rows(tmp_path, architecture, configuration):
    """The report's rows, by a process that compiles instead of interpreting."""
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), architecture, configuration]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(rows, limits):
    assert rows
    for row in rows:
        # Of data centres' Blackwell: the barriers of its products are counted with them.
        assert row["atomics"] == 0 or row["architecture"] == "sm_100", row
        assert row["load"] >= limits["load"], row
        if OLDER:
            assert row["shared"] <= CHIPS[row["architecture"]].shared, row
            continue
        assert row["spilled"] == 0, row
        assert row["registers"] <= limits["registers"], row
        assert row["shared"] <= limits["shared"], row
        # Code beyond an instruction cache, or a compiler that users wait for.
        assert row["instructions"] <= limits.get("instructions", 16000), row
        assert row["cpu_seconds"] <= 3 * limits.get("cpu_seconds", 20), row
        if row["occupancy"] != "":
            assert row["occupancy"] >= limits.get("occupancy", 25), row


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["gather many bfloat16 1024", "gather gated many bfloat16 1024"])
def test_gather(tmp_path, name, architecture):
    rows = compile_rows(tmp_path, architecture, name)
    check(rows, LIMITS[name])
    # Offsets into the table are products in 64 bits; the one in 32 is of a program's columns.
    assert rows[0]["offsets"] == "2xi32+3xi64"


# What takes long to compile, and the lookups, of which one on an older GPU is enough.
LARGE = ("product backward many",)
LOOKUPS = ("product many", "product some", "product few", "flat ")
SMALL = [n for n in LIMITS if not n.startswith((*LARGE, *LOOKUPS, "gather"))]
COMPILED = [(name, architecture) for name in SMALL for architecture in ("sm_80", "sm_90")]
COMPILED += [(name, "sm_90") for name in LIMITS if name.startswith(LOOKUPS)]
COMPILED += [("product many of 32", architecture) for architecture in ("sm_80", "sm_100")]


@pytest.mark.parametrize(("name", "architecture"), COMPILED)
def test_small_kernels(tmp_path, name, architecture):
    check(compile_rows(tmp_path, architecture, name), LIMITS[name])


def check_products(rows):
    """Though their sums fill registers, a quarter of the most warps run."""
    products = [row for row in rows if row["kernel"].startswith("grad_")]
    assert len(products) >= 2
    assert all(row["occupancy"] >= 25 for row in products)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_lookup_backward(tmp_path, architecture):
    rows = compile_rows(tmp_path, architecture, "product backward many 512")
    check(rows, LIMITS["product backward many 512"])
    if architecture.startswith("sm_"):
        check_products(rows)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["4096", "float16", "float32"])
def test_lookup_backward_of_other_shapes(tmp_path, name, architecture):
    name = f"product backward many {name}"
    check(compile_rows(tmp_path, architecture, name), LIMITS[name])


def test_every_lookup_has_limits():
    from pkm_triton.kernels import flat_key_topk, product_key_topk

    for launcher in (product_key_topk, flat_key_topk):
        module = importlib.import_module(launcher.__module__)
        assert set(module.shipped_configurations()) <= set(LIMITS)


@pytest.mark.parametrize(
    ("version", "named"), [((9, 0), "sm_90"), ((8, 6), "sm_86"), ((7, 5), None), (None, None)]
)
def test_here_is_the_gpu_of_this_machine(version, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(chip, "_chip", chip._chip.__wrapped__)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: SimpleNamespace(
            major=version[0], minor=version[1], multi_processor_count=9,
            shared_memory_per_block_optin=99 << 10,
        ),
    )  # fmt: skip
    if named is None:
        with pytest.raises(ValueError, match=r"architectures: (this GPU's, sm_75|'here' needs)"):
            architecture_here()
    else:
        assert architecture_here() == named


def test_rocm_says_nothing_of_shared_memory(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(
        gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304,
        shared_memory_per_block_optin=0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert chip._chip.__wrapped__(0) == CHIPS["gfx942"]
    del properties.shared_memory_per_block_optin
    properties.gcnArchName = "gfx9999"
    assert chip._chip.__wrapped__(0) == chip.Chip("gfx9999", 304, 64 << 10)


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942", "gfx1100"])
def test_the_compiler_knows_every_option(architecture):
    """Triton refuses to launch with one that it does not know, but compiles ahead of time."""
    waves = 64 if architecture == "gfx942" else 32
    kind = "hip" if architecture.startswith("gfx") else "cuda"
    target = GPUTarget(kind, architecture if kind == "hip" else 90, waves)
    known = vars(make_backend(target).parse_options({"enable_fp_fusion": True}))
    with as_if(CHIPS[architecture]), recorded_launches() as launches:
        for launch in shipped_configurations().values():
            launch()
    assert launches
    for kernel, _, kwargs in launches:
        options = {name for name in kwargs if name not in kernel.arg_names}
        assert "num_warps" in options
        assert options <= known.keys(), kernel.__name__


SIZES = """
import torch
from pkm_triton.kernels.chip import CHIPS, as_if
from pkm_triton.kernels import product_key_topk
from pkm_triton.kernels.launches import recorded_launches
from pkm_triton.perf.compiled.launches import compiled_for

with as_if(CHIPS["sm_90"]), recorded_launches() as launches:
    for num_subkeys in (128, 512, 1000, 4096):
        for heads in (1, 4, 8):
            for tokens in (12000, 16384):
                make = dict(dtype=torch.bfloat16, device="meta")
                query = torch.empty(tokens, heads, 512, **make)
                subkeys = torch.empty(heads, 2, num_subkeys, 256, **make)
                product_key_topk(query, subkeys, 32)
print(len({compiled_for(*launch) for launch in launches}))
specialised = [
    f"{kernel.__name__}: {each.name}"
    for kernel, *_ in launches
    for each in kernel.params
    if not each.is_constexpr and not each.name.endswith("_ptr") and not each.do_not_specialize
]
print(*sorted(set(specialised)))
"""


def test_a_sweep_over_sizes_and_heads_compiles_once(tmp_path):
    script = tmp_path / "sizes.py"
    script.write_text(SIZES)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    count, specialised = done.stdout.split("\n")[:2]
    # That selects, and that combines.
    assert int(count) == 2, done.stdout
    assert not specialised.strip()
