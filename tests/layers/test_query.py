import copy

import pytest
import torch
from torch import nn

from pkm_triton import ProductKeyMemory, QueryNetwork


def test_linear_then_batch_norm():
    network = QueryNetwork(10, 2, 6)
    x = torch.randn(30, 10)
    expected = network.norm.weight * nn.functional.batch_norm(
        nn.functional.linear(x, network.layers[0].weight, network.layers[0].bias),
        None,
        None,
        training=True,
    )
    torch.testing.assert_close(network(x), expected.view(30, 2, 6))


def test_mlp():
    network = QueryNetwork(10, 2, 6, None, hidden=(20, 7))
    kinds = [type(module) for module in network.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    widths = [module.out_features for module in network.layers if isinstance(module, nn.Linear)]
    assert widths == [20, 7, 12]
    assert network(torch.randn(3, 4, 10)).shape == (3, 4, 2, 6)


def test_layer_norm_is_per_head():
    query = QueryNetwork(10, 2, 6, "layer")(torch.randn(5, 10))
    torch.testing.assert_close(query.mean(-1), torch.zeros(5, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_masked_statistics_are_those_of_batch_norm(momentum):
    network = QueryNetwork(10, 2, 6)
    network.norm.momentum = momentum
    twin = copy.deepcopy(network)
    for _ in range(3):
        x, mask = torch.randn(40, 10), torch.rand(40) > 0.4
        torch.testing.assert_close(network(x, mask)[mask], twin(x[mask]))
    for (name, one), other in zip(network.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_eval_uses_running_statistics_and_leaves_them():
    network = QueryNetwork(10, 2, 6)
    for _ in range(5):
        network(3 + torch.randn(50, 10))
    network.eval()
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(4, 10)
    alone = network(x[:1])
    torch.testing.assert_close(network(x)[:1], alone)
    torch.testing.assert_close(network(x, torch.tensor([True, False, True, True]))[:1], alone)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_half_precision_parameters_with_a_mask():
    network = QueryNetwork(10, 2, 6).to(torch.bfloat16)
    query = network(torch.randn(20, 10, dtype=torch.bfloat16), torch.rand(20) > 0.5)
    assert query.dtype == torch.bfloat16


class TestSyncBatchNorm:
    """Converted as torch.nn converts, it goes on working; the exchange itself is torch's."""

    def test_conversion_keeps_parameters_and_results(self):
        layer = ProductKeyMemory(16, num_subkeys=8, heads=2, top_k=3, query_dim=8).eval()
        x = torch.randn(5, 16)
        expected = layer(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
        assert isinstance(converted.query_net.norm, nn.SyncBatchNorm)
        assert torch.equal(converted(x), expected)
        assert set(converted.state_dict()) == set(layer.state_dict())

    def test_training_with_a_mask(self):
        network = QueryNetwork(10, 2, 6)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        x, mask = torch.randn(20, 10), torch.rand(20) > 0.4
        torch.testing.assert_close(converted(x, mask)[mask], network(x, mask)[mask])
        for (name, one), other in zip(
            converted.named_buffers(), network.named_buffers(), strict=False
        ):
            torch.testing.assert_close(one, other[1], msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_within_an_adapter(training):
    """As PEFT's `modules_to_save` puts it: the way to keep its statistics with an adapter."""

    class Wrapper(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, *args):
            return self.norm(*args)

    net = QueryNetwork(8, 2, 6).train(training)
    wrapped = copy.deepcopy(net)
    wrapped.norm = Wrapper(wrapped.norm)
    x, mask = torch.randn(5, 8), torch.tensor([True, True, False, True, True])
    for given in (None, mask):
        ours, theirs = wrapped(x, given), net(x, given)
        torch.testing.assert_close(ours[mask], theirs[mask])
    torch.testing.assert_close(wrapped.norm.norm.running_mean, net.norm.running_mean)
    torch.testing.assert_close(wrapped.norm.norm.running_var, net.norm.running_var)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3) > 0, ValueError, r"mask must have shape \[2\] to go with x \[2, 8\]"),
        (torch.ones(2), TypeError, "mask must be a bool tensor"),
    ],
)
def test_wrong_masks(norm, mask, error, message):
    with pytest.raises(error, match=message):
        QueryNetwork(8, 2, 6, norm)(torch.randn(2, 8), mask)
