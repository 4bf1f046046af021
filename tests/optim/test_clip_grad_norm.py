import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient
from pkm_triton.optim import SparseAdam, clip_grad_norm_


def model(sparse_grad):
    torch.manual_seed(3)
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4}
    return nn.Sequential(nn.Linear(8, 8), pkm.ProductKeyMemory(8, **sizes, sparse_grad=sparse_grad))


def gradients(sparse_grad, passes=1):
    net = model(sparse_grad)
    for seed in range(passes):
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed))
        net(x).square().sum().backward()
    return net


def assert_same_gradients(net, other):
    for (name, one), two in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), two.grad, msg=name)


# torch's own takes factored gradients too; of sparse ones it has no norm.
CLIPS = {
    "sparse": (True, clip_grad_norm_),
    "factored": ("factored", clip_grad_norm_),
    "factored, torch's": ("factored", nn.utils.clip_grad_norm_),
}


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf, "inf"])
@pytest.mark.parametrize("max_norm", [0.1, 1e6, torch.inf])
@pytest.mark.parametrize("name", CLIPS)
def test_as_torch_on_dense_gradients(name, max_norm, norm_type, foreach):
    sparse_grad, clip = CLIPS[name]
    mixed, dense = gradients(sparse_grad), gradients(False)
    ours = clip(mixed.parameters(), max_norm, norm_type, foreach=foreach)
    theirs = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type, foreach=foreach)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(mixed, dense)
    kind = type(mixed[1].values.grad)
    assert mixed[1].values.grad.is_sparse or kind is FactoredGradient


@pytest.mark.parametrize("sparse_grad", [True, "factored"])
def test_accumulated_gradients_count_a_row_once(sparse_grad):
    mixed, dense = gradients(sparse_grad, 3), gradients(False, 3)
    torch.testing.assert_close(
        clip_grad_norm_(mixed.parameters(), 0.5), nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
    )
    assert_same_gradients(mixed, dense)


def test_sorted_rows_that_come_twice_are_one():
    """As a sum of two gradients may be; without a mark that they are coalesced."""
    parameter = nn.Parameter(torch.ones(5, 3))
    values = torch.tensor([[1.0] * 3, [-3.0] * 3, [2.0] * 3])
    parameter.grad = torch.sparse_coo_tensor([[1, 1, 3]], values, (5, 3), check_invariants=True)
    assert clip_grad_norm_(parameter, 1.0).item() == pytest.approx(24**0.5, rel=1e-5)
    assert parameter.grad.is_coalesced()
    assert parameter.grad.indices().tolist() == [[1, 3]]
    assert parameter.grad.to_dense().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_several_sparse_dimensions():
    parameter = nn.Parameter(torch.ones(5, 3, 2))
    index = torch.tensor([[1, 1, 3], [2, 2, 0]])
    parameter.grad = torch.sparse_coo_tensor(
        index, torch.ones(3, 2), (5, 3, 2), check_invariants=True
    )
    assert clip_grad_norm_(parameter, 1.0).item() == pytest.approx(10**0.5, rel=1e-5)
    assert parameter.grad.to_dense().norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("sparse_grad", [True, "factored"])
def test_with_a_grad_scaler(sparse_grad):
    mixed, plain = model(sparse_grad), model(sparse_grad)
    x = torch.randn(30, 8)
    optimisers = [SparseAdam(net.parameters(), lr=0.01) for net in (mixed, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(mixed(x).square().sum()).backward()
    scaler.unscale_(optimisers[0])
    clip_grad_norm_(mixed.parameters(), 0.5)
    scaler.step(optimisers[0])
    scaler.update()
    plain(x).square().sum().backward()
    clip_grad_norm_(plain.parameters(), 0.5)
    optimisers[1].step()
    for (name, one), other in zip(mixed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_nothing_to_clip_and_bad_arguments():
    assert clip_grad_norm_([nn.Parameter(torch.ones(3))], 1.0) == 0
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, torch.nan, 0.0])
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(parameter, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="max_norm is -1"):
        clip_grad_norm_(parameter, -1)
    for bad in ("1", None):
        with pytest.raises(TypeError, match=f"max_norm must be a number above 0, not {bad!r}"):
            clip_grad_norm_([parameter], bad)
    with pytest.raises(TypeError, match="norm_type must be a number above 0, not 'two'"):
        clip_grad_norm_([parameter], 1.0, "two")
    with pytest.raises(TypeError, match="parameters must be tensors, not NoneType"):
        clip_grad_norm_(None, 1.0)
    with pytest.raises(TypeError, match=r"parameters\[1\] must be a tensor, not Linear"):
        clip_grad_norm_([parameter, nn.Linear(2, 2)], 1.0)
    with pytest.raises(ValueError, match="norm_type is 0"):
        clip_grad_norm_(parameter, 1, 0)
