"""Forward, backward and a step of the optimiser on the Triton path, as a user runs them."""

import copy

import pytest
import torch

import pkm_triton as pkm


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_training_step_equals_the_reference(device, guard, kind, sparse_grad):
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4}
    layers = [kind(8, **sizes, query_norm="layer", sparse_grad=sparse_grad, device=device)]
    layers.append(copy.deepcopy(layers[0]))
    x = torch.randn(5, 8, device=device)
    for layer, backend in zip(layers, ("triton", "torch"), strict=True):
        with pkm.use_backend(backend):
            # A large eps: else a gradient of nearly nothing makes a whole step either way.
            optimiser = pkm.optim.SparseAdam(pkm.param_groups(layer, 0.01, 0.1), eps=1e-3)
            layer(x).square().sum().backward()
            optimiser.step()
    for (name, one), other in zip(
        layers[0].named_parameters(), layers[1].parameters(), strict=True
    ):
        assert one.grad.is_sparse == other.grad.is_sparse, name
        torch.testing.assert_close(one.grad.to_dense(), other.grad.to_dense(), msg=name)
        torch.testing.assert_close(one, other, msg=name)


def test_triton_refuses_float64(device):
    query = torch.randn(3, 2, 8, dtype=torch.float64, device=device)
    subkeys = torch.randn(2, 2, 9, 4, device=device)
    with pkm.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        pkm.product_key_topk(query, subkeys, 5)
