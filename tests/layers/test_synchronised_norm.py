import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_two_ranks
from torch import nn

import pkm_triton as pkm

# Rank 0 has 12 rows and rank 1 has 8; afterwards nobody has rows, then one rank alone.
RANK = """
import pkm_triton as pkm
data = torch.load(f"{folder}/data.pt")
network = pkm.QueryNetwork(5, 2, 4)
network.load_state_dict(data["state"])
pkm.synchronise_batch_norm(network)
rows = slice(0, 12) if rank == 0 else slice(12, 20)
x = data["x"][rows].requires_grad_()
for masked in (False, True):
    query = network(x, data["mask"][rows] if masked else None)
    (query * data["grad"][rows]).sum().backward()
network(data["x"][:0])
network(data["x"][:0] if rank else data["x"])
grads = {name: p.grad for name, p in network.named_parameters()}
torch.save({"x": x.grad, "query": query.detach(), "grads": grads,
            "state": network.state_dict()}, f"{folder}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_ranks_give_the_one_rank_result(tmp_path):
    network = pkm.QueryNetwork(5, 2, 4)
    x, mask = torch.randn(20, 5), torch.rand(20) > 0.3
    grad = torch.randn(20, 2, 4)
    nn.init.normal_(network.norm.weight)
    data = {"state": network.state_dict(), "x": x, "mask": mask, "grad": grad}
    torch.save(data, tmp_path / "data.pt")
    run_two_ranks(RANK, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    leaf = x.clone().requires_grad_()
    for each in (None, mask):
        query = network(leaf, each)
        (query * grad).sum().backward()
    network(x)
    torch.testing.assert_close(torch.cat([first["query"], second["query"]])[mask], query[mask])
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), leaf.grad)
    for name, parameter in network.named_parameters():
        both = first["grads"][name] + second["grads"][name]
        torch.testing.assert_close(both, parameter.grad, msg=name, atol=1e-4, rtol=1e-4)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(first["state"][name], tensor, msg=name)
        torch.testing.assert_close(second["state"][name], tensor, msg=name)


def test_only_ranks_of_its_group_are_asked(monkeypatch):
    asked, these = [], dist.ProcessGroup(0, 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: asked.append(group) or 2)
    monkeypatch.setattr(dist, "all_reduce", lambda _, group=None: asked.append(group))
    network = pkm.synchronise_batch_norm(pkm.QueryNetwork(5, 2, 4), these)
    network(torch.randn(6, 5)).square().sum().backward()
    assert asked == [these] * 5
    with pytest.raises(TypeError, match="group is 'these', but must be None or a ProcessGroup"):
        pkm.synchronise_batch_norm(network, "these")
    assert network.norm.group is these


def test_alone_it_is_batch_norm_over_the_same_tensors():
    layer = pkm.ProductKeyMemory(16, num_subkeys=8, heads=2, top_k=3, query_dim=8)
    twin = copy.deepcopy(layer)
    norm = layer.query_net.norm
    assert pkm.synchronise_batch_norm(layer) is layer
    assert not dist.is_initialized()
    assert layer.query_net.norm is norm
    assert norm.synchronised
    assert list(layer.state_dict()) == list(twin.state_dict())
    x, mask = torch.randn(20, 16), torch.rand(20) > 0.4
    for each in (None, mask):
        assert torch.equal(layer(x, each), twin(x, each))
    assert torch.equal(layer.eval()(x), twin.eval()(x))
    assert layer(x[:0]).shape == (0, 16)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_other_norms_stay():
    layer = pkm.ProductKeyMemory(8, num_subkeys=4, top_k=2, query_dim=4, query_norm="layer")
    pkm.synchronise_batch_norm(layer)
    assert isinstance(layer.query_net.norm, nn.LayerNorm)
