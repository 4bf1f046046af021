"""Forward, backward and a step of the optimiser on the Triton path, as a user runs them."""

import copy

import pytest
import torch

import pkm_triton as pkm


@pytest.mark.parametrize("sparse_grad", [False, True, "factored"])
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
        assert type(one.grad) is type(other.grad), name
        assert one.grad.is_sparse == other.grad.is_sparse, name
        torch.testing.assert_close(one.grad.to_dense(), other.grad.to_dense(), msg=name)
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_with_a_gate_is_as_training(device, guard, dtype):
    """In one kernel, where the gate is of the table's dtype."""
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": None}
    layer = pkm.ProductKeyMemory(8, 5, **sizes, output="gated", device=device)
    layer.values = torch.nn.Parameter(layer.values.data.to(dtype))
    x = torch.randn(5, 8, device=device)
    with pkm.use_backend("triton"):
        recorded = layer(x)
        with torch.no_grad():
            out = layer(x)
    assert out.dtype == recorded.dtype
    torch.testing.assert_close(out, recorded)


# The kernels are float32; but these functions are linear in each argument, so that a long step
# costs no accuracy.
@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradcheck_of_the_gather(device):
    values = torch.randn(6, 5, device=device, requires_grad=True)
    weights = torch.rand(3, 4, device=device, requires_grad=True)
    slots = torch.randint(0, 6, (3, 4), device=device)
    with pkm.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda v, w: pkm.gather_values(v, slots, w), (values, weights),
            eps=0.5, atol=1e-4, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gradcheck_of_the_lookup(device):
    query = (1 + torch.rand(2, 1, 4, device=device) / 8).requires_grad_()
    # Scores far apart, so that no step changes the selection.
    steps = torch.tensor([[3.0, 1.0], [1.0, 0.5]], device=device)
    subkeys = (torch.arange(4.0, device=device)[:, None] * steps[None, :, None]).requires_grad_()
    with pkm.use_backend("triton"):
        _, expected = pkm.product_key_topk(query, subkeys, 3)

        def scores(query, subkeys):
            scores, slots = pkm.product_key_topk(query, subkeys, 3)
            assert torch.equal(slots, expected), "the step is too long: it changes the selection"
            return scores

        assert torch.autograd.gradcheck(
            scores, (query, subkeys), eps=2e-3, atol=1e-2, rtol=1e-2, fast_mode=True
        )


def test_gather_is_linear(device, guard):
    values, other = torch.randn(40, 9, device=device), torch.randn(40, 9, device=device)
    slots = torch.randint(0, 40, (20, 7), device=device)
    weights = torch.rand(20, 7, device=device)
    with pkm.use_backend("triton"):
        out = pkm.gather_values(values, slots, weights)
        torch.testing.assert_close(
            pkm.gather_values(values + 2 * other, slots, weights),
            out + 2 * pkm.gather_values(other, slots, weights),
        )
        torch.testing.assert_close(pkm.gather_values(values, slots, 3 * weights), 3 * out)


def test_triton_refuses_float64(device):
    query = torch.randn(3, 2, 8, dtype=torch.float64, device=device)
    subkeys = torch.randn(2, 2, 9, 4, device=device)
    with pkm.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        pkm.product_key_topk(query, subkeys, 5)
