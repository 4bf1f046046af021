"""Run one op whenever it is asked to, in a process of its own, of whichever checkout is imported.

Imports nothing but torch and the public ops, so that an older checkout can be timed by this file.
On stdin: a line of JSON with the op, its shape and the device; then `run N` lines. On stdout: a
line of JSON for each, `{"first": seconds}` for the first call, then the seconds of N calls.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pkm_triton as pkm


def make(op: str, shape: dict[str, Any], device: str) -> Callable[[], Any]:
    """The op on random inputs, the same in every process on the same device."""
    generator = torch.Generator(device).manual_seed(0)
    drawn: dict[str, Any] = {"generator": generator, "device": device}
    dtype = getattr(torch, shape["dtype"])
    tokens, heads, num, width = (
        shape[name] for name in ("tokens", "heads", "num_subkeys", "query_dim")
    )

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, **drawn, dtype=dtype)

    if "topk" in op:
        query = randn(tokens, heads, width)
        product = op.startswith("product")
        keys = randn(heads, 2, num, width // 2) if product else randn(heads, num * num, width)
        lookup = pkm.product_key_topk if product else pkm.flat_key_topk
        if not op.endswith("gradient"):
            return lambda: lookup(query, keys, shape["top_k"])
        scores, _ = lookup(query.requires_grad_(), keys.requires_grad_(), shape["top_k"])
        weight = torch.ones_like(scores)
        return lambda: torch.autograd.grad(scores, (query, keys), weight, retain_graph=True)
    reads = (tokens, heads * shape["top_k"])
    slots = torch.randint(num * num, reads, **drawn, dtype=torch.int32)
    weights = torch.rand(reads, **drawn)
    # Equal rows: what they hold changes nothing, and drawing them all would take long.
    values = randn(1, shape["value_dim"]).expand(num * num, -1).contiguous()
    if op in ("sample_values", "scatter_values"):
        x = randn(tokens, shape["value_dim"])
        if op == "sample_values":
            return lambda: pkm.sample_values(values, slots, x)
        return lambda: pkm.scatter_values(slots, weights, x, num * num)
    if op == "sparse_adam":
        rows = torch.randperm(num * num, **drawn)[: slots.numel()].sort().values
        grad_rows = randn(1, shape["value_dim"]).expand(len(rows), -1).contiguous()
        values.requires_grad_().grad = torch.sparse_coo_tensor(
            rows[None], grad_rows, values.shape, is_coalesced=True
        )
        return pkm.optim.SparseAdam([values]).step
    if op == "scatter_adam":
        out = pkm.gather_values(values.requires_grad_(), slots, weights, sparse_grad="factored")
        out.backward(torch.ones_like(out))
        return pkm.optim.SparseAdam([values]).step
    if not op.endswith("gradient"):
        return lambda: pkm.gather_values(values, slots, weights)
    sparse = "sparse" in op
    leaves = values.requires_grad_(), weights.requires_grad_()
    out = pkm.gather_values(*leaves[:1], slots, weights, sparse_grad=sparse)
    grad = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def timed(call: Callable[[], Any], device: str, cache: Tensor | None) -> float:
    """Seconds of a call, on a GPU by events and from a cold L2 cache.

    While that is cleared the call is launched: its kernels are timed, and not their launches.
    """
    if cache is None:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def main() -> None:
    """Serve until stdin ends."""
    given = json.loads(sys.stdin.readline())
    device = given["device"]
    torch.set_num_threads(given["threads"])
    cache = None
    if device == "cuda":
        cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    started = time.perf_counter()
    call = make(given["op"], given["shape"], device)
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"first": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        turns = int(line.split()[1])
        seconds = [timed(call, device, cache) for _ in range(turns)]
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
