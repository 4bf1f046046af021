import copy
import math

import pytest
import torch
from ranks import run_two_ranks

import pkm_triton as pkm


def brute_force(num_slots, slots, weights):
    """Usage and KL as section 4.2 of the paper words them."""
    sums = [0.0] * num_slots
    for slot, weight in zip(
        slots.flatten().tolist(), weights.double().flatten().tolist(), strict=True
    ):
        sums[slot] += weight
    total = math.fsum(sums)
    z = [s / total for s in sums]
    usage = sum(value != 0 for value in z) / num_slots
    kl = math.log(num_slots) + sum(value * math.log(value) for value in z if value > 0)
    return usage, kl


def reads(tokens=20, num_slots=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, num_slots // 2, (tokens, 3, 4), generator=generator, dtype=torch.int32)
    return slots, torch.rand(tokens, 3, 4, generator=generator)


def test_equals_the_definition():
    usage = pkm.MemoryUsage(50)
    slots, weights = reads()
    weights[slots == 3] = 0  # read, but with no weight: not used
    usage.update(slots[:7], weights[:7])
    usage.update(slots[7:].long(), weights[7:])
    expected_usage, expected_kl = brute_force(50, slots, weights)
    assert usage.usage().item() == pytest.approx(expected_usage, abs=1e-12)
    assert usage.kl().item() == pytest.approx(expected_kl, abs=1e-12)


def test_uniform_and_single_reads():
    usage = pkm.MemoryUsage(8)
    usage.update(torch.arange(8), torch.ones(8))
    assert usage.usage() == 1
    assert usage.kl().item() == pytest.approx(0, abs=1e-12)
    usage.reset()
    assert usage.usage() == 0
    assert usage.kl().isnan()
    usage.update(torch.tensor([5]), torch.tensor([0.3]))
    assert usage.usage() == 1 / 8
    assert usage.kl().item() == pytest.approx(math.log(8))


def test_merge():
    slots, weights = reads()
    whole, first, second = (pkm.MemoryUsage(50) for _ in range(3))
    whole.update(slots, weights)
    first.update(slots[:9], weights[:9])
    second.update(slots[9:], weights[9:])
    first.merge(second)
    torch.testing.assert_close(first.kl(), whole.kl())
    assert first.usage() == whole.usage()
    with pytest.raises(ValueError, match="other has 8 slots, but must have 50"):
        first.merge(pkm.MemoryUsage(8))


RANK = """
import pkm_triton as pkm
usage = pkm.MemoryUsage(50)
usage.update(*torch.load(f"{folder}/{rank}.pt"))
alone = pkm.MemoryUsage(50)
alone.merge(usage)
groups = [dist.new_group([each]) for each in range(2)]
alone.all_reduce(groups[rank])
assert torch.equal(alone.weight_sums, usage.weight_sums)
usage.all_reduce()
print(usage.usage().item(), usage.kl().item())
"""


@pytest.mark.slow
def test_all_reduce(tmp_path):
    parts = reads(seed=0), reads(seed=1)
    for rank, part in enumerate(parts):
        torch.save(part, tmp_path / f"{rank}.pt")
    both = [tuple(map(float, out.split())) for out in run_two_ranks(RANK, tmp_path)]
    assert both[0] == both[1]
    slots, weights = (torch.cat(pair) for pair in zip(*parts, strict=True))
    assert both[0] == pytest.approx(brute_force(50, slots, weights), abs=1e-12)


@pytest.mark.parametrize(
    ("slots", "weights", "error", "message"),
    [
        (torch.tensor([50]), torch.ones(1), ValueError, r"slots must lie in \[0, 50\)"),
        (torch.tensor([-1]), torch.ones(1), ValueError, r"slots must lie in \[0, 50\)"),
        (torch.tensor([1.0]), torch.ones(1), TypeError, "slots has dtype torch.float32"),
        (torch.tensor([1]), torch.ones(1).long(), TypeError, "weights has dtype torch.int64"),
        (torch.tensor([1, 2]), torch.ones(1), ValueError, "the same shape"),
        (torch.tensor([1, 2]), torch.tensor([0.5, -0.1]), ValueError, "at least 0, but range from"),
        (torch.tensor([1, 2]), torch.tensor([0.5, torch.nan]), ValueError, "weights must be finit"),
        (torch.tensor([1, 2]), torch.tensor([0.5, torch.inf]), ValueError, "weights must be finit"),
    ],
    ids=["high", "low", "float slots", "integer weights", "shapes", "negative", "nan", "infinite"],
)
def test_bad_reads_change_nothing(slots, weights, error, message):
    usage = pkm.MemoryUsage(50)
    usage.update(*reads())
    before = usage.weight_sums.clone()
    with pytest.raises(error, match=message):
        usage.update(slots, weights)
    assert torch.equal(usage.weight_sums, before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_slots is 0"):
        pkm.MemoryUsage(0)
    with pytest.raises(ValueError, match="device is 'moon', but must be one that this machine has"):
        pkm.MemoryUsage(5, device="moon")
    with pytest.raises(TypeError, match="other must be a MemoryUsage, not int"):
        pkm.MemoryUsage(5).merge(5)
    with pytest.raises(TypeError, match="model must be a module, not int"), pkm.track_usage(3):
        pass


def test_a_models_memories_are_tracked_while_the_block_lasts():
    sizes = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4}
    net = torch.nn.Sequential(
        torch.nn.Linear(8, 8), pkm.ProductKeyMemory(8, **sizes), pkm.FlatKeyMemory(8, **sizes)
    ).eval()
    x = torch.randn(5, 8)
    with pkm.track_usage(net) as usages:
        hidden = net[0](x)
        net(x[:2])
        net(x[2:])
    assert list(usages) == ["1", "2"]
    for layer, usage, given in (
        (net[1], usages["1"], hidden),
        (net[2], usages["2"], net[1](hidden)),
    ):
        weights, slots = layer.lookup(given)
        brute = torch.zeros(36, dtype=torch.float64)
        for slot, weight in zip(slots.flatten().tolist(), weights.flatten().tolist(), strict=True):
            brute[slot] += weight
        torch.testing.assert_close(usage.weight_sums, brute)
        assert layer.usages == []
    net(x)
    assert usages["1"].weight_sums.sum() == pytest.approx(10)


def test_tracking_ends_with_an_error_and_does_not_enter_the_state():
    layer = pkm.ProductKeyMemory(8, num_subkeys=6, heads=2, top_k=3, query_dim=4)
    keys = list(layer.state_dict())
    with pytest.raises(ValueError, match="x must have shape"), pkm.track_usage(layer):  # noqa: PT012
        assert list(layer.state_dict()) == keys
        layer(torch.randn(2, 3))
    assert layer.usages == []


def small():
    return pkm.ProductKeyMemory(8, num_subkeys=6, heads=2, top_k=3, query_dim=4).eval()


def counted(usages):
    return round(usages[""].weight_sums.sum().item(), 4)


def test_blocks_may_be_nested():
    layer, x = small(), torch.randn(1, 8)
    with pkm.track_usage(layer) as outer:
        layer(x)
        with pkm.track_usage(layer) as inner:
            layer(x)
        layer(x)
    assert (counted(outer), counted(inner)) == (6, 2)
    assert layer.usages == []


def test_blocks_may_overlap():
    layer, x = small(), torch.randn(1, 8)
    first, second = pkm.track_usage(layer), pkm.track_usage(layer)
    one = first.__enter__()
    layer(x)
    two = second.__enter__()
    layer(x)
    first.__exit__(None, None, None)
    layer(x)
    second.__exit__(None, None, None)
    layer(x)
    assert (counted(one), counted(two)) == (4, 4)
    assert layer.usages == []


def test_copies_are_not_counted():
    layer = small()
    with pkm.track_usage(layer) as usages:
        twin = copy.deepcopy(layer)
        twin(torch.randn(1, 8))
    assert twin.usages == []
    assert counted(usages) == 0


def test_under_a_default_device():
    layer = small()
    with torch.device("meta"), pkm.track_usage(layer) as usages:
        layer(torch.randn(3, 8, device="cpu"))
    assert counted(usages) == 6
    assert usages[""].kl().device.type == "cpu"


def test_begun_in_inference_mode(device):
    layer = small().eval().to(device)
    x = torch.randn(3, 8, device=device)
    with torch.inference_mode(), pkm.track_usage(layer) as usages:
        layer(x)
    weights, slots = layer.lookup(x)
    usages[""].update(slots, weights)
    assert counted(usages) == 12


# Of torch, where it traces a Function.
@pytest.mark.filterwarnings(r"ignore:::torch\.(_inductor|jit|_dynamo)")
def test_compiled_whole():
    layer = small()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (4, 5):
        with pkm.track_usage(layer) as usages:
            for _ in range(2):
                compiled(torch.randn(tokens, 8))
        assert counted(usages) == 4 * tokens
    compiled(torch.randn(4, 8))
    assert counted(usages) == 20
