"""Slots that train, and all others bitwise as they were."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

import pkm_triton as pkm

SIZES = {"num_subkeys": 6, "heads": 2, "top_k": 4, "query_dim": 4, "query_norm": None}
SLOTS = torch.tensor([30, 3, 7, 7, 12])
OPTIMISERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SparseAdam": lambda params: pkm.optim.SparseAdam(params, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("sparse_grad", [False, True, "factored"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_all_others_stay_bitwise_as_they_are(kind, optimiser, sparse_grad):
    layer = kind(8, **SIZES, sparse_grad=sparse_grad)
    before = layer.values.detach().clone()
    tuned = pkm.train_slots(layer, SLOTS)
    assert tuned.shape == (4, 8)
    step = OPTIMISERS[optimiser]([p for p in layer.parameters() if p.requires_grad])
    for _ in range(3):
        step.zero_grad()
        layer(torch.randn(20, 8)).square().sum().backward()
        step.step()
    assert torch.equal(layer.values, before)
    x = torch.randn(9, 8)
    out = layer(x)
    pkm.merge_slots(layer)
    changed = (layer.values != before).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 7, 12, 30]
    torch.testing.assert_close(layer(x), out)
    assert layer.values.requires_grad
    assert layer.tuned is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_reads_the_same_as_before(dtype):
    layer = pkm.ProductKeyMemory(8, **SIZES, output="gated", dtype=dtype)
    x = torch.randn(2, 9, 8, dtype=dtype)
    expected = layer(x)
    pkm.train_slots(layer, layer.lookup(x)[1][0, 0, 0])
    torch.testing.assert_close(layer(x), expected)


def test_gradients_are_those_of_the_table():
    layer = pkm.ProductKeyMemory(4, **SIZES, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x).sin().sum().backward()
    expected, layer.values.grad = layer.values.grad, None
    keys, layer.subkeys.grad = layer.subkeys.grad, None
    tuned = pkm.train_slots(layer, SLOTS)
    layer(x).sin().sum().backward()
    torch.testing.assert_close(tuned.grad, expected[[3, 7, 12, 30]])
    torch.testing.assert_close(layer.subkeys.grad, keys)
    assert layer.values.grad is None
    rows = tuned.detach().requires_grad_()
    assert gradcheck(lambda r: functional_call(layer, {"tuned.values": r}, (x,)), (rows,))


def test_the_slots_of_a_task():
    """As sparse memory finetuning: count a background and a task, rank, train, keep the rest."""
    layer = pkm.ProductKeyMemory(8, **SIZES).eval().requires_grad_(False)
    background, task = pkm.SlotCounts(36), pkm.SlotCounts(36)
    centre = torch.randn(8)
    for _ in range(10):
        background.update(layer.lookup(torch.randn(16, 8))[1])
    inputs, target = centre + 0.1 * torch.randn(16, 8), torch.randn(8)
    task.update(layer.lookup(inputs)[1])
    tuned = pkm.train_slots(layer, pkm.rank_slots(task, background, 6))
    step = torch.optim.Adam([tuned], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(inputs) - target).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (torch.tensor([36]), ValueError, r"slots must lie in \[0, 36\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, "slots is empty"),
        (torch.rand(3), TypeError, r"slots has dtype torch\.float32"),
        ([1, 2], TypeError, "slots must be a tensor"),
    ],
)
def test_wrong_slots(slots, error, message):
    layer = pkm.ProductKeyMemory(4, **SIZES)
    with pytest.raises(error, match=message):
        pkm.train_slots(layer, slots)
    assert layer.tuned is None
    assert layer.values.requires_grad


def test_wrong_calls():
    layer = pkm.ProductKeyMemory(4, **SIZES)
    with pytest.raises(ValueError, match="no slots of the layer train"):
        pkm.merge_slots(layer)
    pkm.train_slots(layer, SLOTS)
    with pytest.raises(ValueError, match="4 slots train already"):
        pkm.train_slots(layer, SLOTS)
    made = torch.nn.utils.parametrizations.weight_norm(pkm.ProductKeyMemory(4, **SIZES), "values")
    with pytest.raises(ValueError, match="made by a parametrization"), torch.no_grad():
        pkm.train_slots(made, SLOTS)
    assert made.tuned is None
    for other in (torch.nn.Linear(4, 4), pkm.ProductKeyExperts(4, **SIZES)):
        with pytest.raises(TypeError, match="layer must be a ProductKeyMemory or FlatKeyMemory"):
            pkm.train_slots(other, SLOTS)
