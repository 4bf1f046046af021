import pytest
import torch
from torch import nn

import pkm_triton as pkm


def model():
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4}
    return nn.Sequential(
        nn.Linear(8, 8), pkm.ProductKeyMemory(8, **sizes), pkm.FlatKeyMemory(8, **sizes)
    )


def test_values_learn_faster():
    net = model()
    rest, values = pkm.param_groups(net)
    assert (rest["lr"], values["lr"]) == (2.5e-4, 1e-3)
    assert {id(p) for p in values["params"]} == {id(net[1].values), id(net[2].values)}
    assert len(rest["params"]) + len(values["params"]) == len(list(net.parameters()))
    optimiser = torch.optim.Adam([rest, values], betas=(0.9, 0.98))
    net(torch.randn(5, 8)).sum().backward()
    optimiser.step()


def test_shared_and_frozen_parameters():
    net = model()
    net[2].values = net[1].values
    net[0].weight.requires_grad_(False)
    rest, values = pkm.param_groups(net, lr=0.1, value_lr=0.2)
    assert [id(p) for p in values["params"]] == [id(net[1].values)]
    assert not any(p is net[0].weight for p in rest["params"])


def test_model_without_memory():
    (group,) = pkm.param_groups(nn.Linear(3, 3))
    assert len(group["params"]) == 2


def test_weight_decay_of_each_group():
    net = model()
    rest, values = pkm.param_groups(net, weight_decay=0.1, value_weight_decay=0)
    assert (rest["weight_decay"], values["weight_decay"]) == (0.1, 0)
    rest, values = pkm.param_groups(net, lr=0, value_weight_decay=0.3)
    assert rest["lr"] == 0
    assert "weight_decay" not in rest
    optimiser = torch.optim.AdamW([rest, values], weight_decay=0.2)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.2, 0.3]


@pytest.mark.parametrize("name", ["lr", "value_lr", "weight_decay", "value_weight_decay"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1"])
def test_bad_arguments(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name} "):
        pkm.param_groups(model(), **{name: value})


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter"):
        pkm.param_groups(nn.ReLU())
    with pytest.raises(TypeError, match="model must be a module, not NoneType"):
        pkm.param_groups(None)
