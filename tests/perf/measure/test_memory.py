import pytest
import torch

from pkm_triton.perf.measure.memory import available_bytes, measure_peak

MIB = 2**20


def allocate(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_peak_of_a_known_pattern_is_exact():
    def call():
        first = allocate(3)
        second = allocate(5)
        del first
        third = allocate(4)
        del second, third

    peak = measure_peak(call)
    assert (peak.peak_bytes, peak.working_bytes) == (9 * MIB, 9 * MIB)


def test_what_was_there_before_is_not_counted():
    before = allocate(64)
    peak = measure_peak(lambda: allocate(2))
    assert peak.peak_bytes == 2 * MIB
    del before


def test_kept_tensors_are_left_out_of_the_working_memory():
    kept = []

    def call():
        temporary = allocate(2)
        kept.append(allocate(7))
        del temporary
        allocate(1)

    peak = measure_peak(call, lambda: kept)
    assert (peak.peak_bytes, peak.working_bytes) == (9 * MIB, 2 * MIB)


def test_an_address_used_before_the_kept_tensor_still_counts():
    kept = []

    def call():
        temporary = allocate(2)
        del temporary
        kept.append(allocate(2))  # often lands where the first one was

    peak = measure_peak(call, lambda: kept)
    assert (peak.peak_bytes, peak.working_bytes) == (2 * MIB, 2 * MIB)


def test_sparse_gradients_are_kept_by_their_parts():
    table = torch.zeros(1000, 256, requires_grad=True)
    slots = torch.arange(512)

    def call():
        # The gradient of the output becomes the values of the table's gradient.
        output = torch.nn.functional.embedding(slots, table, sparse=True)
        output.backward(torch.ones_like(output))

    peak = measure_peak(call, lambda: [table.grad])
    assert table.grad.is_sparse
    # Its indices are the slots, which were there before.
    assert peak.peak_bytes - peak.working_bytes == table.grad._values().nbytes


def test_measuring_says_nothing(capfd):
    measure_peak(lambda: allocate(1))
    assert capfd.readouterr() == ("", "")


def test_available_memory_is_plausible():
    assert 64 * MIB < available_bytes("cpu") < 2**50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_on_a_gpu_is_what_the_allocator_says():
    def call():
        first = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        second = torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")
        del first, second

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    peak = measure_peak(call, device="cuda")
    assert peak.peak_bytes == torch.cuda.max_memory_allocated() - before == 8 * MIB
