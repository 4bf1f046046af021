import pytest

from pkm_triton.perf.records.points import IMPLEMENTATIONS
from pkm_triton.perf.sweep.predict import predicted_sweep_seconds
from pkm_triton.perf.sweep.presets import PAPER_SIZES, PRESETS, make_points


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_name_each_point_once_and_can_all_be_run(preset, device):
    points = make_points(preset, {}, device=device, all_threads=2)
    assert len(set(points)) == len(points)
    assert not any(point.unsupported() for point in points)
    assert all(point.value_dim == point.dim for point in points)
    assert {point.device for point in points} == {device}


def test_the_default_follows_the_device():
    points = make_points("default", {}, device="cuda", all_threads=8)
    assert {point.dtype for point in points} == {"bfloat16"}
    assert {point.dim for point in points} == {1024}
    assert {point.tokens for point in points} == {1, 64, 16_384}
    assert {p.num_subkeys for p in points if p.keys == "product"} >= {128, 4096}
    assert {point.top_k for point in points} == {8, 16, 32, 64, 128}
    assert {point.heads for point in points} == {1, 2, 4, 8}
    assert {point.implementation for point in points} == set(IMPLEMENTATIONS)
    assert {p.num_subkeys for p in points if p.implementation == "textbook-tuned"} >= {128, 4096}
    assert {p.tokens for p in make_points("default", {}, device="cpu", all_threads=2)} == {512}


def test_the_default_takes_at_most_ten_minutes_on_a_gpu():
    points = make_points("default", {}, device="cuda", all_threads=8)
    least, most = predicted_sweep_seconds(points, PRESETS["default"].seconds)
    assert 60 < least < most <= 610
    quick = make_points("quick", {}, device="cuda", all_threads=8)
    assert predicted_sweep_seconds(quick, PRESETS["quick"].seconds)[1] < most / 3


@pytest.mark.parametrize("preset", PRESETS)
def test_on_a_gpu_no_preset_measures_launches_alone(preset):
    points = make_points(preset, {}, device="cuda", all_threads=8)
    assert {point.dtype for point in points} == {"bfloat16"}
    assert max(point.tokens for point in points) >= 4096


def test_the_time_predicted_counts_each_compilation():
    one = make_points(None, {"num_subkeys": [64]}, device="cpu", all_threads=1)
    plain = predicted_sweep_seconds(one, 0.5)
    assert 1 <= plain[0] < 2.5
    assert plain[1] == pytest.approx(plain[0] + 2)
    given = {"num_subkeys": [64], "implementation": ["textbook-compiled", "textbook-tuned"]}
    two = make_points(None, given, device="cpu", all_threads=1)
    assert predicted_sweep_seconds(two, 0.5)[0] > 60


def test_the_default_covers_the_papers_sizes_with_both_kinds_of_keys():
    points = make_points("default", {}, device="cpu", all_threads=2)
    for keys in ("product", "flat"):
        sizes = {p.num_subkeys for p in points if p.keys == keys and p.top_k == 32}
        assert sizes == set(PAPER_SIZES)


def test_a_given_axis_replaces_that_of_every_grid():
    given = {"num_subkeys": [16, 32], "threads": [1], "dim": [64]}
    points = make_points("default", given, device="cpu", all_threads=2)
    assert {p.num_subkeys for p in points} == {16, 32}
    assert {(p.threads, p.dim, p.value_dim) for p in points} == {(1, 64, 64)}
    assert {p.threads for p in make_points("baselines", {}, device="cpu", all_threads=3)} == {1, 3}


def test_the_kind_of_gradient_tells_no_forward_points_apart():
    given = {"pass_name": ["forward"], "sparse_grad": [False, True]}
    points = make_points("baselines", given, device="cpu", all_threads=2)
    assert len(points) == 2 * 2 * 3 * 2
    assert not any(point.sparse_grad for point in points)


def test_unknown_preset_and_empty_axis_are_refused():
    with pytest.raises(ValueError, match="preset: 'slow' is unknown; allowed: quick, default"):
        make_points("slow", {}, device="cpu", all_threads=1)
    with pytest.raises(ValueError, match="heads: no value"):
        make_points("quick", {"heads": []}, device="cpu", all_threads=1)


def test_one_rank_has_no_layout_and_several_have_columns_unless_told():
    given = {"ranks": [1, 2], "layout": ["columns", "rows"]}
    points = make_points(None, given, device="cpu", all_threads=1)
    found = [(point.ranks, point.layout) for point in points]
    assert found == [(1, "none"), (2, "columns"), (2, "rows")]
    (alone,) = make_points(None, {"ranks": [2]}, device="cpu", all_threads=1)
    assert alone.layout == "columns"
    (other,) = make_points(
        None, {"ranks": [2], "implementation": ["textbook"]}, device="cpu", all_threads=1
    )
    assert "pkm_triton alone" in other.unsupported()
