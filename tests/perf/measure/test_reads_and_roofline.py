import dataclasses
import types

import numpy
import pytest
import torch

from pkm_triton.perf.measure import roofline
from pkm_triton.perf.measure.reads import TRAINED, generate_slots, read_shares, write_shares
from pkm_triton.perf.measure.workload import Workload
from pkm_triton.perf.records.points import Point


def draw(distribution, shape, num_slots):
    generator = torch.Generator().manual_seed(0)
    return generate_slots(distribution, shape, num_slots, generator=generator, device="cpu")


@pytest.mark.parametrize("distribution", ["uniform", "zipf", "trained"])
def test_slots_are_in_range_and_repeat(distribution):
    slots = draw(distribution, (50, 4, 32), 97)
    assert slots.shape == (50, 4, 32)
    assert slots.dtype == torch.int32
    assert slots.min() >= 0
    assert slots.max() < 97
    assert torch.equal(slots, draw(distribution, (50, 4, 32), 97))
    assert torch.equal(draw(distribution, (3,), 1), torch.zeros(3, dtype=torch.int32))


def test_uniform_reads_are_even_and_zipf_reads_follow_their_rank():
    count, slots = 200_000, 20
    even = draw("uniform", (count,), slots).bincount(minlength=slots) / count
    torch.testing.assert_close(even, torch.full((slots,), 1 / slots), atol=3e-3, rtol=0)
    by_rank = (draw("zipf", (count,), slots).bincount(minlength=slots) / count).sort(
        descending=True
    )
    weights = 1 / torch.arange(1, slots + 1)
    torch.testing.assert_close(by_rank.values, weights / weights.sum(), atol=4e-3, rtol=0)
    assert not torch.equal(by_rank.indices, torch.arange(slots))


def test_trained_reads_are_as_uneven_as_recorded():
    parts, shares = read_shares(TRAINED)
    assert (parts[0], shares[0]) == (0, 0)
    assert (parts[-1], shares[-1]) == (1, 1)
    assert (parts.diff() > 0).all()
    # The most read first: the share of the reads rises ever more slowly.
    steepness = shares.diff() / parts.diff()
    assert (steepness.diff() <= 1e-3 * steepness[:-1]).all()
    count, slots = 200_000, 1000
    drawn = draw("trained", (count,), slots).bincount(minlength=slots) / count
    by_rank = drawn.sort(descending=True)
    assert not torch.equal(by_rank.indices, torch.arange(slots))
    for end in (100, 300, 1000):
        expected = numpy.interp(end / slots, parts, shares)
        assert by_rank.values[:end].sum().item() == pytest.approx(expected, abs=0.01)


def test_shares_come_back_as_they_were_written(tmp_path):
    write_shares(tmp_path / "reads.csv", [(0.25, 0.5), (1.0, 1.0)])
    parts, shares = read_shares(tmp_path / "reads.csv")
    assert parts.tolist() == [0, 0.25, 1]
    assert shares.tolist() == [0, 0.5, 1]


POINT = Point(
    num_subkeys=8, top_k=3, heads=2, dim=16, value_dim=24, query_dim=4, tokens=5, dtype="float32"
)


def test_forward_traffic_is_what_the_tensors_take():
    x, weight = torch.empty(5, 16), torch.empty(16, 8)
    query, subkeys = torch.empty(5, 2, 4), torch.empty(2, 2, 8, 2)
    scores, slots = torch.empty(5, 2, 3), torch.empty(5, 2, 3, dtype=torch.int32)
    rows, output = torch.empty(11, 24), torch.empty(5, 24)
    expected = {
        roofline.query_bytes(POINT): (x, weight, query),
        roofline.lookup_bytes(POINT): (query, subkeys, scores, slots),
        roofline.gather_bytes(POINT, 11): (slots, scores, rows, output),
    }
    for found, tensors in expected.items():
        assert found == sum(tensor.nbytes for tensor in tensors)
    assert roofline.moved_bytes(POINT, 11) == sum(expected)


def test_flat_keys_are_read_whole():
    flat = dataclasses.replace(POINT, keys="flat")
    more = roofline.lookup_bytes(flat) - roofline.lookup_bytes(POINT)
    assert more == 4 * (torch.empty(2, 64, 4).numel() - torch.empty(2, 2, 8, 2).numel())


def test_a_dense_gradient_writes_all_rows_and_a_sparse_one_those_read():
    dense = dataclasses.replace(POINT, pass_name="forward+backward")
    sparse = dataclasses.replace(dense, sparse_grad=True)
    difference = roofline.gather_bytes(dense, 11) - roofline.gather_bytes(sparse, 11)
    assert difference == (64 - 11) * 24 * 4
    assert roofline.moved_bytes(sparse, 11) > roofline.moved_bytes(POINT, 11)


def test_half_precision_halves_what_is_not_a_score_or_a_slot():
    half = dataclasses.replace(POINT, dtype="bfloat16")
    assert roofline.query_bytes(half) * 2 == roofline.query_bytes(POINT)


def test_the_lookups_share_is_its_bytes_over_what_the_device_could_move():
    moved = roofline.lookup_bytes(POINT)
    assert roofline.lookup_share(POINT, 2.0, 1e9) == pytest.approx(moved / 2e6)


def test_a_copy_is_measured_for_each_number_of_threads(monkeypatch):
    monkeypatch.setattr(roofline, "copy_bandwidth", lambda *_: float(torch.get_num_threads()))
    roofline._copied.cache_clear()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert roofline.copied_here("cpu") == threads
    finally:
        torch.set_num_threads(before)
        roofline._copied.cache_clear()


def test_a_cpu_has_no_roofline():
    assert roofline.bandwidth("cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_bandwidth_is_plausible():
    bandwidth = roofline.bandwidth("cuda")
    assert bandwidth is None or 5e10 < bandwidth < 3e13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_backward_and_step_traffic_is_what_the_tensors_take(dtype, sparse_grad):
    point = dataclasses.replace(POINT, dtype=dtype, pass_name="step", sparse_grad=sparse_grad)
    forward = dataclasses.replace(point, pass_name="forward")

    def empty(*shape):
        return torch.empty(shape, dtype=point.torch_dtype)

    def nbytes(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    x, weight, query = empty(5, 16), empty(16, 8), empty(5, 2, 4)
    subkeys, output = empty(2, 2, 8, 2), empty(5, 24)
    scores, slots = torch.empty(5, 2, 3), torch.empty(5, 2, 3, dtype=torch.int32)
    weights = empty(5, 2, 3)
    read, table = empty(11, 24), empty(64, 24)
    assert roofline.query_bytes(forward) == nbytes(x, weight, query)
    assert roofline.lookup_bytes(forward) == nbytes(query, subkeys, scores, slots)
    assert roofline.gather_bytes(forward, 11) == nbytes(slots, weights, read, output)
    assert roofline.step_bytes(forward, 11) == 0

    backward = roofline.query_bytes(point) - roofline.query_bytes(forward)
    assert backward == nbytes(x, weight, query, x, weight)
    backward = roofline.lookup_bytes(point) - roofline.lookup_bytes(forward)
    assert backward == nbytes(query, subkeys, slots, scores, query, subkeys)
    written = read if sparse_grad else table
    backward = roofline.gather_bytes(point, 11) - roofline.gather_bytes(forward, 11)
    assert backward == nbytes(slots, weights, read, output, weights, written)

    for implementation in ("pkm_triton", "textbook"):
        step = 0
        for parameter in (weight, subkeys, written):
            dtype = point.torch_dtype
            if implementation == "pkm_triton" and sparse_grad and parameter is written:
                dtype = torch.promote_types(dtype, torch.float32)
            moment = torch.empty(parameter.shape, dtype=dtype)
            gradient, reads_and_writes = parameter, 2
            step += nbytes(gradient) + reads_and_writes * nbytes(parameter, moment, moment)
        other = dataclasses.replace(point, implementation=implementation)
        assert roofline.step_bytes(other, 11) == step
    factors = dataclasses.replace(point, pass_name="fused-step", sparse_grad=True)
    less = roofline.step_bytes(dataclasses.replace(point, sparse_grad=True), 11)
    less -= roofline.step_bytes(factors, 11)
    assert less == nbytes(read) - nbytes(output) - 2 * nbytes(weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("implementation", ["pkm_triton", "textbook"])
def test_the_traffic_of_a_step_has_the_moments_that_optimisers_keep(
    dtype, sparse_grad, implementation
):
    point = Point(
        implementation, num_subkeys=8, top_k=3, heads=2, dim=16, value_dim=24, query_dim=4,
        query_norm="none", tokens=5, pass_name="step", sparse_grad=sparse_grad, dtype=dtype,
    )  # fmt: skip
    workload = Workload(point)
    workload.whole.run()
    states = [state for each in workload.whole._optimizers for state in each.state.values()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    parameters = [each for each in workload.memory.parameters() if each.ndim > 1]
    # Of a table that is read whole; biases and norms are left out of the formula.
    expected = sum(3 * each.nbytes for each in parameters)
    expected += sum(2 * each.nbytes for each in moments if each.ndim > 1)
    assert roofline.step_bytes(point, 64) == expected


def test_the_datasheets_bandwidth_is_in_bytes_a_second(monkeypatch):
    """An H100 SXM: 2619 MHz, 5120 bits, two transfers a clock: 3.35 TB/s on its datasheet."""
    properties = types.SimpleNamespace(memory_clock_rate=2_619_000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert roofline.bandwidth("cuda") == pytest.approx(3.35e12, rel=0.01)
    monkeypatch.setattr(torch.cuda, "get_device_properties", types.SimpleNamespace)
    assert roofline.bandwidth("cuda") is None
