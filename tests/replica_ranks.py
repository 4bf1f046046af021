"""What replicated tables go through on each rank."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pkm_triton as pkm

FORMS = (False, True, "factored")


def run(rank, ranks):
    """Gradients are means over ranks, of parameters that took the place of those replicated too."""
    mesh = init_device_mesh("cpu", (ranks,))
    for form in FORMS:
        _one_model(form, rank, mesh, late=False)
        _one_model(form, rank, mesh, late=True)


def _one_model(form, rank, mesh, late):
    with torch.device("meta" if late else "cpu"):
        model = nn.ModuleList(_memory(form) for _ in range(2))
    pkm.share_values(model)
    pkm.distributed.shard_memory(model, mesh, "replicate")
    model.to_empty(device="cpu")
    torch.manual_seed(rank)
    for layer in model:
        layer.reset_parameters()
    assert len(pkm.param_groups(model)[1]["params"]) == 1
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict(), assign=True)
    for each in (model, copy.deepcopy(model), loaded):
        assert each[0].values is each[1].values
        for _ in range(2):
            sum(layer(torch.randn(3, 8)).square().mean() for layer in each).backward()
        mine = each[0].values.grad.to_dense()
        of_all = [torch.empty_like(mine) for _ in range(mesh.size())]
        torch.distributed.all_gather(of_all, mine)
        assert mine.count_nonzero() > 0
        for theirs in of_all:
            assert torch.equal(mine, theirs), (form, late, each is model)


def _memory(form):
    return pkm.ProductKeyMemory(
        8, num_subkeys=5, heads=2, top_k=3, query_dim=4, query_norm="layer", sparse_grad=form
    )
