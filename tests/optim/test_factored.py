"""Gradients that are kept as their factors, as tensors."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient
from pkm_triton.optim import SparseAdam

SLOTS = torch.tensor([[0, 1, 1], [1, 3, 5]])


def gather(values, slots=SLOTS, scale=1.0, weights=None):
    """A gather whose gradient is kept as its factors."""
    weights = (
        torch.linspace(0.1, 1, slots.numel()).view(slots.shape) if weights is None else weights
    )
    out = pkm.gather_values(values, slots, weights, sparse_grad="factored")
    return (out * torch.arange(1.0, 5)).sum() * scale


@pytest.fixture
def values():
    """A table with a gradient of one gather."""
    table = nn.Parameter(torch.randn(6, 4))
    gather(table).backward()
    return table


@pytest.mark.parametrize(
    "scale",
    [
        lambda g: g * 3,
        lambda g: 3 * g,
        lambda g: g * torch.tensor(3.0),
        lambda g: torch.tensor([3.0]) * g,
        lambda g: g / (1 / 3),
        lambda g: g / torch.tensor(1 / 3),
        lambda g: g + g + g,
        lambda g: g.add(g, alpha=2),
        lambda g: g.mul_(3),
        lambda g: g.div_(torch.tensor(1 / 3)),
        lambda g: g.add_(g, alpha=2.0),
        lambda g: (torch._foreach_mul_([g], 3.0), g)[1],
        lambda g: (torch._foreach_mul_([g], torch.tensor(3.0)), g)[1],
        lambda g: (torch._foreach_mul_([torch.ones(2), g], [2.0, 3.0]), g)[1],
        lambda g: (torch._foreach_div_([torch.ones(2), g], 1 / 3), g)[1],
    ],
)
def test_scaling(values, scale):
    expected = 3 * values.grad.to_dense()
    scaled = scale(values.grad)
    assert isinstance(scaled, FactoredGradient)
    torch.testing.assert_close(scaled.to_dense(), expected)


def test_scaling_in_a_list_reaches_the_others():
    plain, values = torch.ones(2), nn.Parameter(torch.randn(6, 4))
    gather(values).backward()
    expected = 5 * values.grad.to_dense()
    torch._foreach_mul_([plain, values.grad], [2.0, 5.0])
    assert torch.equal(plain, torch.full((2,), 2.0))
    torch.testing.assert_close(values.grad.to_dense(), expected)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, torch.inf])
@pytest.mark.parametrize("elements", [1 << 24, 1, 11])
def test_norms(values, norm_type, elements, monkeypatch):
    """Of all elements at once, or of a few columns at a time."""
    monkeypatch.setattr("pkm_triton.reads.NORM_ELEMENTS", elements)
    gather(values, torch.tensor([[5, 5]]), -0.3).backward()  # adds to what is there
    dense = values.grad.to_dense()
    expected = torch.linalg.vector_norm(dense, norm_type)
    torch.testing.assert_close(values.grad.vector_norm(norm_type), expected)
    torch.testing.assert_close(values.grad.norm(norm_type), expected)
    torch.testing.assert_close(torch.linalg.vector_norm(values.grad, norm_type), expected)
    one, two = torch._foreach_norm([dense, values.grad], norm_type)
    torch.testing.assert_close(one, two)


def test_a_norm_in_half_precision_is_summed_in_float32():
    table = nn.Parameter(torch.ones(4, 1000, dtype=torch.bfloat16))
    slots = torch.arange(4).view(1, 4)
    weights = torch.full((1, 4), 1.01)
    out = pkm.gather_values(table, slots, weights, sparse_grad="factored")
    out.backward(torch.ones_like(out))
    norm = table.grad.vector_norm()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(1.01 * 4000**0.5, rel=1e-5)


@pytest.mark.parametrize("how", ["optimiser", "module", "zero_", "foreach", "zeros_like"])
def test_setting_to_zero(values, how):
    optimiser = SparseAdam([values])
    before = values.detach().clone()
    kept = values.grad
    if how == "optimiser":
        optimiser.zero_grad(set_to_none=False)
    elif how == "module":
        module = nn.ParameterDict({"table": values})
        module.zero_grad(set_to_none=False)
    elif how == "foreach":
        torch._foreach_zero_([values.grad])
    elif how == "zeros_like":
        values.grad = torch.zeros_like(values.grad)
    else:
        values.grad.zero_()
    assert (values.grad is kept) == (how != "zeros_like")
    assert values.grad.to_dense().count_nonzero() == 0
    assert values.grad.vector_norm() == 0
    optimiser.step()
    assert torch.equal(values, before)
    gather(values).backward()
    again = nn.Parameter(before.clone())
    gather(again).backward()
    assert torch.equal(values.grad.to_dense(), again.grad.to_dense())


def test_a_clone_has_reads_of_its_own_and_a_view_has_not(values):
    clone, view, copied = values.grad.clone(), values.grad.detach(), copy.deepcopy(values.grad)
    before = clone.to_dense()
    gather(values).backward()  # added in place
    assert torch.equal(clone.to_dense(), before)
    assert torch.equal(copied.to_dense(), before)
    torch.testing.assert_close(view.to_dense(), 2 * before)
    view.zero_()
    assert values.grad.to_dense().count_nonzero() == 0
    assert torch.equal(clone.to_dense(), before)


def test_one_gradient_of_two_tables_is_not_shared():
    one, two = (nn.Parameter(torch.zeros(6, 4)) for _ in range(2))
    gather(one + two).backward()
    before = two.grad.to_dense()
    gather(one).backward()
    assert torch.equal(two.grad.to_dense(), before)
    torch.testing.assert_close(one.grad.to_dense(), 2 * before)


@pytest.mark.parametrize("how", ["pickle", "save", "save all", "no reads"])
def test_saving(values, how):
    grad = values.grad
    if how == "no reads":
        grad = torch.zeros_like(grad)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(grad))
    else:
        file = io.BytesIO()
        torch.save({"grad": grad}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=how != "save all")["grad"]
    assert isinstance(loaded, FactoredGradient)
    assert torch.equal(loaded.to_dense(), grad.to_dense())
    assert (loaded.shape, loaded.dtype, loaded.device) == (grad.shape, grad.dtype, grad.device)


def test_shared_memory(values):
    assert not values.grad.is_shared()
    before = values.grad.to_dense()
    assert values.grad.share_memory_() is values.grad
    assert values.grad.is_shared()
    assert all(part.slots.is_shared() and part.weights.is_shared() for part in values.grad.reads)
    assert torch.equal(values.grad.to_dense(), before)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection_looks_at_its_elements(values):
    weights = torch.ones(2, 3)
    with torch.autograd.detect_anomaly():
        gather(values, weights=weights).backward()
        weights[1, 2] = math.nan
        with pytest.raises(RuntimeError, match="'_GatherBackward' returned nan values in its 0th"):
            gather(values, weights=weights).backward()


def test_buffers_may_be_used_again_before_the_step():
    """What a gather was given, and its output's gradient, are the caller's again."""
    values = nn.Parameter(torch.randn(6, 4))
    slots, weights = torch.tensor([[0, 1], [1, 3]]), torch.rand(2, 2)
    pkm.gather_values(values, slots, weights).backward(torch.ones(2, 4))
    expected, values.grad = values.grad, None
    grad_output = torch.ones(2, 4)
    pkm.gather_values(values, slots, weights, sparse_grad="factored").backward(grad_output)
    for buffer in (slots, weights, grad_output):
        buffer.fill_(2)
    assert torch.equal(values.grad.to_dense(), expected)


def test_factors_are_small():
    """Indices, weights and the output's gradient are kept; no row a read."""
    values = nn.Parameter(torch.randn(5000, 64))
    slots = torch.randint(5000, (20, 32), dtype=torch.int32)
    weights = torch.rand(20, 32)
    out = pkm.gather_values(values, slots, weights, sparse_grad="factored")
    out.backward(torch.randn_like(out))
    (part,) = values.grad.reads
    kept = part.slots.nbytes + part.weights.nbytes + part.grad_output.nbytes
    assert kept == 20 * (32 * 8 + 64 * 4)
