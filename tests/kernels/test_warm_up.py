"""What `warm_up` compiles: all that the passes and the step then launch, for any sizes, once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from triton.runtime.interpreter import InterpretedFunction

import pkm_triton as pkm
from pkm_triton.compiling import launches_of
from pkm_triton.kernels.chip import INTERPRETER, as_if
from pkm_triton.kernels.launches import recorded_launches
from pkm_triton.perf.check import lookups
from pkm_triton.perf.check.setting import Setting

SIZES = {"num_subkeys": 4, "heads": 1, "top_k": 2, "query_dim": 4, "query_norm": "layer"}
TOKENS = 2
KINDS = {
    "product": pkm.ProductKeyMemory,
    "flat": pkm.FlatKeyMemory,
    "experts": pkm.ProductKeyExperts,
}
# The interpreter, of what is uninitialised.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def compiled_for(kernel, args, kwargs):
    """What a kernel is compiled for: the dtypes of tensors, and all constants and options."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    return kernel.__name__, *sorted(
        (name, str(value.dtype if isinstance(value, torch.Tensor) else value))
        for name, value in bound.items()
        if isinstance(value, torch.Tensor) or name.isupper() or name not in kernel.arg_names
    )


@pytest.fixture
def launched(monkeypatch):
    """What is launched, while it runs."""
    found = set()
    run = InterpretedFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        found.add(compiled_for(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return found


def train(layer, optimizer, tokens=TOKENS):
    x = torch.randn(tokens, layer.dim, dtype=layer.values.dtype, requires_grad=True)
    with pkm.use_backend("triton"):
        layer(x).float().square().sum().backward()
        if optimizer is not None:
            optimizer.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize(
    ("kind", "sparse_grad", "dtype"),
    [
        ("product", False, torch.float32),
        ("product", True, torch.bfloat16),
        ("product", "factored", torch.float16),
        ("flat", False, torch.bfloat16),
        ("experts", True, torch.float32),
        ("experts", "factored", torch.bfloat16),
    ],
)
def test_plans_every_launch_of_a_training_step(kind, sparse_grad, dtype, launched):
    layer = KINDS[kind](8, **SIZES, sparse_grad=sparse_grad, dtype=dtype)
    optimizer = pkm.optim.SparseAdam(layer.tables)
    planned = {compiled_for(*launch) for launch in launches_of([layer], TOKENS, optimizer)}
    assert not launched
    train(layer, optimizer)
    assert launched <= planned
    assert {name for name, *_ in planned} == {name for name, *_ in launched}


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_plans_the_options_of_a_step(launched):
    options = {"capturable": True, "rounding": "master"}
    layer = pkm.ProductKeyMemory(8, **SIZES, sparse_grad="factored", dtype=torch.bfloat16)
    optimizer = pkm.optim.SparseAdam(layer.tables, **options)
    planned = {compiled_for(*launch) for launch in launches_of([layer], TOKENS, optimizer)}
    train(layer, optimizer)
    assert launched <= planned


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_the_slots_that_train_beside_the_others(dtype, launched):
    layer = pkm.ProductKeyMemory(8, **SIZES, sparse_grad=True, dtype=dtype)
    tuned = pkm.train_slots(layer, torch.tensor([3, 5]))
    optimizer = pkm.optim.SparseAdam([tuned])
    planned = {compiled_for(*launch) for launch in launches_of([layer], TOKENS, optimizer)}
    train(layer, optimizer)
    assert launched <= planned
    assert "sparse_adam_kernel" in {name for name, *_ in launched}


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    if not distributed.is_gloo_available():
        pytest.skip("needs gloo")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("form", [False, True, "factored"])
def test_plans_the_gather_of_this_ranks_part(form, mesh, launched):
    layer = pkm.ProductKeyMemory(8, **SIZES, sparse_grad=form, dtype=torch.bfloat16)
    pkm.distributed.shard_memory(layer, mesh, "columns", narrow_weights=True)
    optimizer = pkm.optim.SparseAdam([layer.values])
    planned = {compiled_for(*launch) for launch in launches_of([layer], TOKENS, optimizer)}
    train(layer, optimizer)
    assert launched <= planned
    assert {"gather_values_kernel"} < {name for name, *_ in launched}


def test_plans_the_tokens_of_all_ranks(mesh, monkeypatch):
    layer = pkm.ProductKeyMemory(8, **SIZES).eval()
    pkm.distributed.shard_memory(layer, mesh, "columns")
    monkeypatch.setattr(type(layer.sharding), "ranks", 100)
    launches = launches_of([layer], TOKENS, None)
    slots = [args[1] for kernel, args, _ in launches if kernel.__name__ == "gather_values_kernel"]
    assert [each.shape for each in slots] == [(100 * TOKENS, 2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_plans_the_gather_of_inference_that_takes_the_gate(launched):
    layer = pkm.ProductKeyMemory(8, **SIZES, output="gated").eval()
    planned = {compiled_for(*launch) for launch in launches_of([layer], TOKENS, None)}
    with torch.no_grad():
        layer(torch.randn(TOKENS, 8))
    assert launched <= planned


def test_plans_no_backward_pass_of_evaluation():
    layer = pkm.ProductKeyMemory(8, **SIZES)
    names = {
        training: {kernel.__name__ for kernel, *_ in launches_of([layer.train(training)], 5, None)}
        for training in (False, True)
    }
    assert "gather_values_kernel" in names[False]
    assert not any("grad" in name or "scatter" in name for name in names[False])
    assert names[False] < names[True]


def test_changes_nothing():
    layer = pkm.ProductKeyMemory(8, **{**SIZES, "query_norm": "batch"}, sparse_grad=True)
    optimizer = pkm.optim.SparseAdam([layer.values])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    launches_of([layer], TOKENS, optimizer)
    assert pkm.warm_up(layer, TOKENS, optimizer=optimizer) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.training
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((3, 5), {}, TypeError, "module must be a module, not int"),
        ((nn.Linear(2, 2), 5), {}, ValueError, "Linear, but must have a memory layer"),
        ((None, 0), {}, ValueError, "tokens is 0"),
        ((None, 2.5), {}, TypeError, "tokens must be an integer"),
        ((None, 5), {"threads": 0}, ValueError, "threads is 0"),
        ((None, 5), {"optimizer": "adam"}, TypeError, "optimizer must be an optimiser"),
    ],
)
def test_refuses_wrong_arguments(arguments, options, kind, message):
    module, tokens = arguments
    module = pkm.ProductKeyMemory(8, **SIZES) if module is None else module
    with pytest.raises(kind, match=message):
        pkm.warm_up(module, tokens, **options)


COMPILED = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import pkm_triton as pkm
from pkm_triton.compiling import launches_of
from pkm_triton.kernels.launches import compile_launches

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
options = dict(query_dim=8, query_norm="layer", device="meta", dtype=torch.bfloat16)

def compiled(tokens, forget=False, **sizes):
    layer = pkm.ProductKeyMemory(16, **options, **sizes).eval()
    launches = launches_of([layer], tokens, None)
    if forget:  # as another process has them: in the folder alone
        for kernel, *_ in launches:
            kernel.device_caches.clear()
    return compile_launches(launches, 2)

rounds = [
    compiled(12000, num_subkeys=128),
    compiled(16384, num_subkeys=128),
    *(compiled(16384, num_subkeys=n, heads=h) for n, h in ((1024, 4), (4096, 4), (512, 4))),
    compiled(16384, True, num_subkeys=128),
]
print(json.dumps(rounds))
"""


def test_compiles_once_for_all_tokens_and_sub_keys(tmp_path):
    """For a GPU that need not be there, into a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout)
    assert set(first) == {"select_kernel", "combine_kernel", "gather_values_kernel"}
    assert all(len(seconds) == 1 and seconds[0] > 0.01 for seconds in first.values())
    assert others == [{}] * len(others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
def test_a_check_names_what_it_will_launch(launched):
    """What is compiled ahead of time is what the checks of the lookups then launch."""
    setting = Setting(torch.device("cpu"), small=True, interpreted=True)
    checks = [check for check in lookups.checks(setting) if check.launch is not None]
    assert len(checks) >= 8
    with as_if(INTERPRETER), recorded_launches() as launches:
        for check in checks:
            check.launch()
    planned = {compiled_for(*launch) for launch in launches}
    with pkm.use_backend("triton"):
        for check in checks[:4] + checks[-2:]:
            assert check.run().status == "PASS"
    assert launched
    assert launched <= planned
