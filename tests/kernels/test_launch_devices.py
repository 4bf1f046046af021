"""Every op, gradient and optimiser launches by the one way that makes its device current."""

import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton import _devices, kernels


def test_all_launches_are_on_their_tensors_device(device, monkeypatch):
    seen = {}
    run = _devices._run

    def record(function, where, *args, **kwargs):
        seen[function.__name__] = where
        return run(function, where, *args, **kwargs)

    monkeypatch.setattr(_devices, "_run", record)
    sizes = {"num_subkeys": 2, "heads": 1, "top_k": 1, "query_dim": 4, "query_norm": "layer"}
    with pkm.use_backend("triton"):
        for kind in (pkm.ProductKeyMemory, pkm.FlatKeyMemory):
            for form in (False, True, "factored"):
                memory = kind(4, **sizes, sparse_grad=form, device=device)
                optimiser = pkm.optim.SparseAdam(memory.parameters())
                # The gradient of what comes before needs that of the weights too.
                x = nn.Parameter(torch.randn(1, 4, device=device))
                memory(x).sum().backward()
                optimiser.step()
        slots = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
        values, weights, x = (torch.ones(n, 2, device=device) for n in (3, 1, 1))
        pkm.sample_values(values, slots, x)
        for sparse in (False, True):
            pkm.scatter_values(slots, weights, x, 3, sparse=sparse)
    assert set(seen) == set(kernels.__all__)
    assert {where.type for where in seen.values()} == {device.type}
