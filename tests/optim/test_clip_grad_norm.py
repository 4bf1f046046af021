import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton.optim import SparseAdam, clip_grad_norm_


def model(sparse_grad):
    torch.manual_seed(3)
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4}
    return nn.Sequential(nn.Linear(8, 8), pkm.ProductKeyMemory(8, **sizes, sparse_grad=sparse_grad))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_as_torch_on_dense_gradients(norm_type, max_norm):
    mixed, dense = model(True), model(False)
    x = torch.randn(30, 8)
    for net in (mixed, dense):
        net(x).square().sum().backward()
    ours = clip_grad_norm_(mixed.parameters(), max_norm, norm_type)
    theirs = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
    torch.testing.assert_close(ours, theirs)
    for (name, one), other in zip(mixed.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad, msg=name)
    assert mixed[1].values.grad.is_sparse


def test_accumulated_gradients_count_a_row_once():
    mixed, dense = model(True), model(False)
    for seed in range(3):
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))
        for net in (mixed, dense):
            net(x).square().sum().backward()
    torch.testing.assert_close(
        clip_grad_norm_(mixed.parameters(), 0.5), nn.utils.clip_grad_norm_(dense.parameters(), 0.5)
    )
    torch.testing.assert_close(mixed[1].values.grad.to_dense(), dense[1].values.grad)


def test_with_a_grad_scaler():
    mixed, plain = model(True), model(True)
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
    with pytest.raises(ValueError, match="norm_type is 0"):
        clip_grad_norm_(parameter, 1, 0)
