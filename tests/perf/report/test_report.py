import dataclasses
import itertools
import math
import re

import pytest

from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.points import DTYPES, IMPLEMENTATIONS, Point
from pkm_triton.perf.records.sweep_row import Row
from pkm_triton.perf.report import compare
from pkm_triton.perf.report.plot_bandwidth import bandwidth_share
from pkm_triton.perf.report.plot_comparison import comparison
from pkm_triton.perf.report.plot_memory import peak_memory
from pkm_triton.perf.report.plot_parts import time_by_part
from pkm_triton.perf.report.plot_ranks import speed_over_ranks
from pkm_triton.perf.report.plot_speed import speed_against_size, speed_along
from pkm_triton.perf.report.plot_step import crossing, reads_per_slot, step_against_reads
from pkm_triton.perf.report.plot_style import (
    count_axis,
    count_label,
    new_figure,
    number,
    slots_label,
)
from pkm_triton.perf.report.slices import by_series, compared, rows_along
from pkm_triton.perf.report.table import all_rows_table, comparison_table, size_table
from pkm_triton.perf.report.write import write_report

SIZES = (128, 256, 384, 512, 768, 1024)


def a_row(median_ms=10.0, **changes):
    figures = {
        "low_ms": median_ms * 0.9,
        "high_ms": median_ms * 1.2,
        "tokens_per_s": changes.get("tokens", 512) / median_ms * 1e3,
        "query_ms": 1.0,
        "lookup_ms": median_ms - 3,
        "gather_ms": 2.0,
        "peak_bytes": 3.0 * 2**20,
        "working_bytes": 2.0 * 2**20,
        "parameter_bytes": 2.0**30,
        "samples": 5,
        "device_name": "some CPU, 2 cores",
        "torch_version": "2.13.0",
        "pkm_triton_version": "0.1.0",
    }
    return Row(**{**figures, **changes}, median_ms=median_ms)


@pytest.fixture
def size_rows():
    product = [a_row(10.0 * 2**step, num_subkeys=size) for step, size in enumerate(SIZES)]
    flat = [a_row(100.0 * size, num_subkeys=size, keys="flat") for size in SIZES[:3]]
    skipped = a_row(
        keys="flat", num_subkeys=512, status="skipped: too slow", median_ms=float("nan")
    )
    return [*product, *flat, skipped]


def cells(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_size_table_has_the_rows_figures(size_rows):
    table = size_table(size_rows)
    assert cells(table, "memory size") == ["16k", "65k", "147k", "262k", "590k", "1M"]
    product = ["51.2k", "25.6k", "12.8k", "6.4k", "3.2k", "1.6k"]
    assert cells(table, "speed (tokens/s), product keys") == product
    assert cells(table, "slow-down, product keys")[-1] == "32.00×"
    assert cells(table, "speed (tokens/s), flat keys") == ["40", "20", "13.3", "–", "–", "–"]
    assert cells(table, "slow-down, flat keys")[:3] == ["1.00×", "2.00×", "3.00×"]
    assert cells(table, "query, lookup, gather (ms), product keys")[0] == "1.00, 7.00, 2.00"
    assert cells(table, "time (ms), flat keys")[:3] == ["12,800", "25,600", "38,400"]
    assert cells(table, "paper, words/s of a whole model on GPUs, flat keys")[-1] == "1.2k"
    assert "flat keys, 262k: skipped: too slow." in table
    assert "some CPU, 2 cores, 1 thread; torch 2.13.0" in table


def test_on_a_gpu_the_table_has_the_share_of_its_bandwidth(size_rows):
    assert "bandwidth" not in size_table(size_rows)
    # In 10 ms half of what 4 times the lookup's bytes are, in 7 ms the lookup's.
    rows = [
        a_row(
            num_subkeys=size,
            device="cuda",
            roofline=0.5,
            moved_bytes=4.0 * roofline.lookup_bytes(Point(num_subkeys=size)),
        )
        for size in SIZES
    ]
    assert cells(size_table(rows), "share of the memory bandwidth, product")[0] == "50%"
    lookup_share = cells(size_table(rows), "the lookup's share of it, product")
    assert lookup_share == [f"{0.5 / 4 * 10 / 7:.0%}"] * len(SIZES)


def test_a_sweep_of_other_sizes_has_no_papers_figures():
    table = size_table([a_row(num_subkeys=size) for size in (100, 128)])
    assert cells(table, "paper, words/s of a whole model on GPUs, product keys") == ["–", "35.8k"]
    assert size_table([a_row(implementation="textbook")]) is None


def test_the_comparison_table_has_ratios_of_medians():
    rows = [
        a_row(10.0, tokens=1),
        a_row(15.0, tokens=1, implementation="textbook", working_bytes=2.0**22),
        a_row(7.0, tokens=2),
        a_row(5.0, tokens=2, implementation="textbook", status="failed: x"),
    ]
    table = comparison_table(rows)
    assert len(table.splitlines()) == 5
    assert table.splitlines()[-1] == (
        "| 512 | 4 | 32 | 1 | forward | – | 1 | 10.0 | 15.0 | 1.50 | 2.00 | 4.00 |"
    )
    assert comparison_table(rows[:1]) is None
    zipf = comparison_table([dataclasses.replace(row, reads="zipf") for row in rows])
    assert "| 1 | forward, zipf reads | – |" in zipf
    assert zipf.count("zipf") == 1


def test_rows_of_one_picture_agree_in_all_but_its_axis(size_rows):
    others = [a_row(num_subkeys=size, heads=1) for size in SIZES[:4]]
    found = rows_along([*others, *size_rows], "num_subkeys", pass_name="forward")
    assert {row.heads for row in found} == {4}
    assert [len(rows) for rows in by_series(found).values()] == [6, 3]
    assert rows_along(size_rows, "num_subkeys", pass_name="forward+backward") == []
    assert rows_along(size_rows, "top_k", pass_name="forward") == []
    other_device = [a_row(num_subkeys=size, device_name="B") for size in (64, 128)]
    found = rows_along([*size_rows[:2], *other_device], "num_subkeys", pass_name="forward", least=2)
    assert len({row.device_name for row in found}) == 1


def test_only_rows_that_differ_in_the_implementation_are_compared():
    rows = [a_row(), a_row(implementation="textbook", top_k=8), a_row(top_k=8)]
    assert [set(found) for found in compared(rows)] == [{"textbook", "pkm_triton"}]


@pytest.mark.parametrize(
    ("slots", "label"), [(128**2, "16k"), (768**2, "590k"), (1024**2, "1M"), (2048**2, "4.19M")]
)
def test_memory_sizes_are_labelled_as_in_the_paper(slots, label):
    assert slots_label(slots) == label


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (35800, "35.8k"),
        (59.31, "59.3"),
        (2e9, "2G"),
        (999.7, "1k"),
        (999_600, "1M"),
        (999.4, "999"),
    ],
)
def test_counts_have_three_digits(value, label):
    assert count_label(value) == label


def test_a_report_has_what_the_rows_suffice_for(size_rows, tmp_path):
    assert write_report([a_row()], tmp_path) == [tmp_path / "table.md", tmp_path / "rows.md"]
    rows = [
        *size_rows,
        *[
            a_row(7.0 * top, top_k=top, query_norm="layer", implementation=name)
            for top in (8, 16, 64)
            for name in ("pkm_triton", "textbook", "product-key-memory")
        ],
        *[a_row(heads=heads) for heads in (1, 2, 8)],
    ]
    written = {path.name for path in write_report(rows, tmp_path)}
    pictures = ("speed_against_size", "speed_against_top_k", "speed_against_heads")
    pictures += ("time_by_part", "peak_memory", "comparison")
    expected = {f"{name}.{kind}" for name in pictures for kind in ("png", "svg")}
    # The rows that differ in the norm differ in k, or in the number of heads, as well.
    assert written == expected | {"table.md", "comparison.md", "rows.md"}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 2**20
    for path in tmp_path.glob("*.svg"):
        assert path.read_text().rstrip().endswith("</svg>")


def test_implementations_of_one_memory_make_a_comparison_picture(tmp_path):
    rows = [
        a_row(10.0 + len(name), implementation=name, threads=threads, tokens=tokens)
        for name in ("pkm_triton", "textbook", "product-key-memory")
        for threads in (1, 2)
        for tokens in (1, 512)
    ]
    names = [path.name for path in write_report(rows, tmp_path)]
    pictures = ("speed_against_tokens", "speed_against_threads", "peak_memory", "comparison")
    expected = [f"{name}.{kind}" for name in pictures for kind in ("png", "svg")]
    assert names == ["table.md", "comparison.md", "rows.md", *expected]


def step_rows(ratio):
    """Dense steps of 100 ms, sparse ones that take `ratio` of it at 1, 2, 4 times the tokens."""
    tokens = (512, 1024, 2048)
    dense = [a_row(100.0, tokens=each, pass_name="step") for each in tokens]
    sparse = [
        a_row(100.0 * part, tokens=each, pass_name="step", sparse_grad=True)
        for each, part in zip(tokens, ratio, strict=True)
    ]
    return sparse, dense


def test_dense_gradients_win_from_where_the_lines_cross():
    assert reads_per_slot(a_row(tokens=2048)) == 2048 * 4 * 32 / 512**2 == 1
    assert crossing(*step_rows((0.25, 0.5, 2.0))) == pytest.approx(2**-0.5)
    assert crossing(*step_rows((0.1, 0.2, 0.3))) is None
    assert crossing(*step_rows((2.0, 3.0, 4.0))) == pytest.approx(0.25)
    # From where on: what is crossed back does not count.
    assert crossing(*step_rows((0.5, 2.0, 0.5))) is None
    assert crossing(*step_rows((2.0, 0.5, 2.0))) == pytest.approx(2**-0.5)


def test_steps_make_a_picture_of_reads(tmp_path):
    sparse, dense = step_rows((0.25, 0.5, 2.0))
    names = {path.name for path in write_report([*sparse, *dense], tmp_path)}
    assert {"step_against_reads.png", "step_against_reads.svg"} <= names
    assert step_against_reads([*sparse[:2], *dense[:2]]) is None


def test_ranks_are_drawn_with_what_they_send(tmp_path):
    def over(ranks, layout, num_subkeys, **changes):
        sent = 512 * 1024.0 * ranks
        return a_row(
            10.0 / ranks, ranks=ranks, layout=layout, num_subkeys=num_subkeys, sent_bytes=sent,
            counted_bytes=sent, query_ms=math.nan, lookup_ms=math.nan, gather_ms=math.nan,
            **changes,
        )  # fmt: skip

    rows = [
        over(ranks, layout, size)
        for size in (128, 256)
        for ranks, layout in ((1, "none"), (2, "columns"), (2, "rows"), (4, "columns"))
    ]
    # Another width, of one rank alone, is no part of it.
    figure = speed_over_ranks([*rows, over(1, "none", 128, top_k=8)])
    speed, sent = figure.axes
    labels = speed.get_legend_handles_labels()[1]
    assert labels == ["1 rank", "2 ranks, columns", "2 ranks, rows", "4 ranks, columns"]
    assert [list(line.get_xdata()) for line in speed.lines] == [[128**2, 256**2]] * 4
    formula, counted = sent.lines[:2]
    assert list(formula.get_xdata()) == [2, 2, 4, 4]
    assert list(formula.get_ydata()) == list(counted.get_ydata()) == [2.0, 2.0, 4.0, 4.0]
    assert speed_over_ranks([row for row in rows if row.ranks == 1]) is None
    # Parts of which no time was taken are no picture of their own.
    names = {path.name for path in write_report(rows, tmp_path)}
    assert "speed_over_ranks.png" in names
    assert "time_by_part.png" not in names


def test_the_same_rows_make_the_same_pictures(size_rows, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_report(size_rows, tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_compare_takes_ratios_over_common_points():
    first = [a_row(10.0), a_row(8.0, top_k=8), a_row(1.0, top_k=9), a_row(1.0, heads=1)]
    second = [
        a_row(20.0, device_name="other", working_bytes=2.0**20),
        a_row(4.0, top_k=8),
        a_row(1.0, top_k=9, status="oom: no"),
    ]
    text = compare.comparison(first, second)
    lines = text.splitlines()
    assert lines[2].endswith("| 10.0 | 20.0 | 2.000 | 0.500 |")
    assert lines[3].endswith("| 8.00 | 4.00 | 0.500 | 1.000 |")
    assert "2 points in both, geometric mean of B / A: 1.000; 2 others in one" in lines[-1]
    # A point that was measured for two lengths of time is one; what is not to be relied on is told.
    longer = [dataclasses.replace(row, seconds=9.0, remark="busy: x") for row in second[:2]]
    last = compare.comparison(first, [*second, *longer]).splitlines()[-1]
    assert "; 2 others in one" in last
    assert last.endswith("Not to be relied on: 2 of 4 times (busy: x).")
    with pytest.raises(ValueError, match="no point"):
        compare.comparison(first, [])


def test_every_row_stands_in_a_table_and_every_axis_in_a_picture(tmp_path):
    """A grid of one's own: what varies is shown, whatever it is."""
    axes = {
        "dtype": ("float32", "bfloat16"),
        "top_k": (8, 32),
        "query_dim": (64, 128),
        "reads": ("layer", "zipf"),
    }
    rows = [
        a_row(float(7 + number), **dict(zip(axes, values, strict=True)))
        for number, values in enumerate(itertools.product(*axes.values()))
    ]
    rows.append(a_row(heads=1, status="oom: 3 GiB", median_ms=float("nan")))
    names = {path.name for path in write_report(rows, tmp_path)}
    assert {f"speed_against_{axis}.png" for axis in axes} <= names
    table = (tmp_path / "rows.md").read_text()
    header, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows)
    assert header.startswith("| top k | heads | query dim | dtype | reads | ms |")
    assert "| 8 | 4 | 64 | float32 | layer | 7.00 | 6.30 to 8.40 | – | 5 | 73.1k |" in lines[0]
    assert lines[-1].endswith("| – | – | – | – | – | – | oom: 3 GiB |")
    assert "num_subkeys 512" in table


def test_a_size_table_for_each_set_of_sizes():
    rows = [a_row(num_subkeys=size, dtype=dtype) for size in (128, 256) for dtype in DTYPES]
    table = size_table(rows)
    assert table.count("### Forward") == len(DTYPES)
    for dtype in DTYPES:
        assert f"batch norm, {dtype}." in table


def test_dims_that_vary_take_their_values_with_them():
    rows = [a_row(dim=dim, value_dim=dim) for dim in (64, 128)]
    assert rows_along(rows, "dim", pass_name="forward") == rows
    other = [a_row(dim=64, value_dim=512), a_row(dim=128, value_dim=512)]
    assert rows_along(other, "dim", pass_name="forward") == []


def test_times_of_a_busy_machine_are_told_in_tables_and_captions(size_rows):
    busy = [
        dataclasses.replace(row, remark="busy: other processes took 1.9 of 2 cores")
        for row in size_rows[:2]
    ]
    rows = [*busy, *size_rows[2:]]
    words = "Not to be relied on: 2 of 9 times (busy: other processes took 1.9 of 2 cores)."
    assert words in size_table(rows)
    assert "Not to be relied on" not in size_table(size_rows)
    figure = speed_against_size(rows)
    caption = " ".join(figure.texts[-1].get_text().split()) if figure.texts else ""
    caption = caption or " ".join(figure.get_supxlabel().split())
    assert "Not to be relied on: 2 of 9 times" in caption
    assert "busy: other processes took" in all_rows_table(rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1710.0, "1,710"), (123.4, "123"), (33.6, "33.6"), (0.0123, "0.0123"), (0.0, "0")],
)
def test_figures_have_no_exponent(value, text):
    assert number(value) == text


@pytest.mark.parametrize("span", [(30, 40), (5, 60), (1, 1e6), (0.5, 2)])
def test_an_axis_has_at_least_four_labels(span):
    figure, (axis,) = new_figure(1)
    axis.plot([1, 2], span)
    count_axis(axis)
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert 4 <= len(ticks) <= 12
    assert figure is not None


def gpu_row(**changes):
    point = {"device": "cuda", "dtype": "bfloat16", "tokens": 16_384, "cpu_ms": 0.5}
    return a_row(**{**point, "device_name": "some GPU", "roofline": 0.4, **changes})


def test_on_a_gpu_the_launches_are_marked():
    rows = [gpu_row(num_subkeys=size, moved_bytes=1e9) for size in (512, 1024)]
    (speed, *_) = speed_against_size(rows).axes
    (line,) = [each for each in speed.get_lines() if "launching" in str(each.get_label())]
    assert list(line.get_xdata()) == [512**2, 1024**2]
    assert list(line.get_ydata()) == pytest.approx([16_384 / 0.5e-3] * 2)
    rows = [a_row(num_subkeys=size, cpu_ms=0.5) for size in (512, 1024)]
    (speed, *_) = speed_against_size(rows).axes
    assert not any("launching" in str(each.get_label()) for each in speed.get_lines())


def test_launches_of_few_tokens_allow_fewer():
    rows = [gpu_row(tokens=tokens, cpu_ms=0.25) for tokens in (64, 1)]
    (panel,) = speed_along(rows, "tokens").axes
    (line,) = [each for each in panel.get_lines() if "launching" in str(each.get_label())]
    assert list(line.get_xdata()) == [1, 64]
    assert list(line.get_ydata()) == pytest.approx([4e3, 256e3])


@pytest.mark.parametrize("draw", [bandwidth_share, lambda rows: speed_along(rows, "heads")])
def test_a_legend_of_all_implementations_fits(draw):
    shown = [name for name in IMPLEMENTATIONS if name != "product-key-memory"]
    figures = {"moved_bytes": 8e9, "copy_bytes_per_s": 2e12, "graph_ms": 5.0}
    rows = [
        gpu_row(implementation=name, num_subkeys=size, **figures)
        for name in shown
        for size in (512, 1024)
    ]
    if draw is not bandwidth_share:
        rows = [dataclasses.replace(row, num_subkeys=512, heads=row.num_subkeys // 128)
                for row in rows]  # fmt: skip
    figure = draw(rows)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) >= len(shown)
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_training_has_a_row_of_panels_of_its_own(size_rows):
    training = [
        dataclasses.replace(row, pass_name="forward+backward", sparse_grad=True)
        for row in size_rows
    ]
    titles = [axis.get_title() for axis in speed_against_size([*size_rows, *training]).axes]
    assert titles == [
        "Speed: forward",
        "Slow-down: forward",
        "Speed: forward+backward, sparse gradients",
        "Slow-down: forward+backward, sparse gradients",
    ]


def test_shares_of_the_measured_copy_and_of_kernels_alone_stand_in_the_table():
    rows = [
        gpu_row(num_subkeys=size, moved_bytes=8e9, copy_bytes_per_s=2e12, graph_ms=9.0)
        for size in (512, 1024)
    ]
    table = size_table(rows)
    assert cells(table, "share of the measured copy, product keys") == ["40%", "40%"]
    assert cells(table, "the kernels alone (ms), product keys") == ["9.00", "9.00"]
    assert "first call" not in table


def test_the_share_of_the_copy_is_drawn_with_that_of_the_kernels_alone():
    rows = [
        gpu_row(num_subkeys=size, moved_bytes=8e9, copy_bytes_per_s=2e12, graph_ms=alone)
        for size, alone in ((512, 8.0), (1024, 5.0))
    ]
    (axis,) = bandwidth_share(rows).axes
    whole, alone, named = axis.get_lines()
    assert list(whole.get_xdata()) == [512**2, 1024**2]
    assert list(whole.get_ydata()) == pytest.approx([0.4, 0.4])
    assert list(alone.get_ydata()) == pytest.approx([0.5, 0.8])
    assert named.get_label() == "the kernels alone (CUDA graph)"
    assert (alone.get_linestyle(), named.get_linestyle()) == ("--", "--")
    assert axis.get_ylabel() == "share of the measured copy"
    assert "(2,000 GB/s)" in axis.figure._supxlabel.get_text()


@pytest.mark.parametrize(
    "changes", [{"copy_bytes_per_s": math.nan}, {"num_subkeys": 512}, {"status": "oom: 9 GiB"}]
)
def test_no_share_of_the_copy_is_drawn_without_two_sizes_that_have_one(changes):
    rows = [
        gpu_row(**{"num_subkeys": size, "moved_bytes": 8e9, "copy_bytes_per_s": 2e12} | changes)
        for size in (512, 1024)
    ]
    assert bandwidth_share(rows) is None


def test_compiling_stands_beside_the_first_call_in_the_table():
    rows = [
        gpu_row(num_subkeys=size, first_call_s=3.5, compile_s=seconds)
        for size, seconds in ((512, 3.25), (1024, 0.0))
    ]
    table = size_table(rows)
    assert cells(table, "of that compiling kernels (s), product keys") == ["3.25", "0"]


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


def test_a_picture_does_not_say_of_all_points_what_varies_along_its_axis():
    by_threads = speed_along([a_row(threads=threads) for threads in (1, 2)], "threads")
    assert "thread" not in caption_of(by_threads)
    by_width = speed_along([a_row(value_dim=width) for width in (64, 128)], "value_dim")
    assert "values" not in caption_of(by_width)
    assert "width 512" in caption_of(by_width)
    kinds = [a_row(pass_name="step", sparse_grad=sparse) for sparse in (False, True)]
    (axis,) = speed_along(kinds, "sparse_grad").axes
    assert axis.get_title() == "Step"


def test_a_caption_tells_what_differs_between_panels():
    def along(**shared):
        return [a_row(num_subkeys=size, **shared) for size in (128, 256)]

    training = {"pass_name": "forward+backward", "sparse_grad": True}
    for draw in (speed_against_size, peak_memory):
        caption = caption_of(draw([*along(), *along(**training)]))
        assert caption.count("k 32") == 1
        caption = caption_of(draw([*along(), *along(top_k=8, **training)]))
        assert re.search("Forward: k 32.*Forward[+]backward.*: k 8", caption), caption


def test_captions_tell_of_the_unreliable_rows_of_every_panel():
    busy = {"remark": "busy: x"}
    forward = [a_row(num_subkeys=size) for size in (128, 256)]
    training = [dataclasses.replace(row, pass_name="forward+backward", **busy) for row in forward]
    words = "Not to be relied on: 2 of 4 times (busy: x)."
    assert words in caption_of(speed_against_size([*forward, *training]))
    sparse, dense = step_rows((0.25, 0.5, 2.0))
    dense = [dataclasses.replace(row, **busy) for row in dense]
    assert "relied on: 3 of 6 times" in caption_of(step_against_reads([*sparse, *dense]))
    textbook = [dataclasses.replace(row, implementation="textbook", **busy) for row in forward]
    assert "relied on" not in caption_of(time_by_part([*forward, *textbook]))


def test_bands_and_the_floor_of_launches_are_of_all_ranks():
    rows = [
        a_row(
            num_subkeys=size, ranks=4, layout="rows", tokens_per_s=4 * 512 / 10e-3,
            device="cuda", cpu_ms=5.0,
        )
        for size in (128, 256)
    ]  # fmt: skip
    axis = speed_against_size(rows).axes[0]
    (band,) = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((2048 / 12e-3, 2048 / 9e-3))
    (floor,) = (line for line in axis.lines if "launching" in line.get_label())
    assert list(floor.get_ydata()) == pytest.approx([2048 / 5e-3] * 2)


def test_a_comparison_tells_apart_what_differs():
    rows = [
        a_row(implementation=name, dtype=dtype, keys=keys)
        for name in ("pkm_triton", "textbook")
        for dtype in ("float32", "bfloat16")
        for keys in ("product", "flat")
    ]
    table = comparison_table(rows)
    kinds = ["| product | float32 |", "| flat | float32 |"]
    kinds += ["| product | bfloat16 |", "| flat | bfloat16 |"]
    assert "| threads | keys | dtype | pkm_triton (ms) |" in table
    assert all(table.count(kind) == 1 for kind in kinds)
    caption = table.partition("|")[0]
    assert "float" not in caption
    assert "width 512" in caption
    figure = comparison(rows)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels) == 4
    assert "float" not in caption_of(figure)
