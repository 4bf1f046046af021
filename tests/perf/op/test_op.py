import pytest
import torch

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.check import planning
from pkm_triton.perf.check.outcome import Check, Outcome
from pkm_triton.perf.measure import roofline
from pkm_triton.perf.op import command
from pkm_triton.perf.op.checkouts import Timed
from pkm_triton.perf.op.command import report
from pkm_triton.perf.op.shapes import OPS, Shape, parse_shape
from pkm_triton.perf.records.environment import commit

ROOT = __import__("pathlib").Path(__file__).parents[3]
QUICK = ["--seconds", "0.01", "--device", "cpu", "--threads", "1"]


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_checked_and_timed(name, capsys):
    assert main(["op", name, *QUICK]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{name}: tokens 4, heads 2")
    assert f"= {OPS[name].formula}; a copy here moves" in second
    assert third.startswith("this checkout: ")
    assert "of the copy, first call" in third


def test_two_checkouts_take_turns(capsys):
    assert main(["op", "gather_values", *QUICK, "--base", str(ROOT)]) == 0
    *_, ours, base, ratio = capsys.readouterr().out.splitlines()
    assert ours.startswith("this checkout: ")
    assert base.startswith("base: ")
    assert 0.05 < float(ratio.removeprefix("this checkout / base: ")) < 20


def test_another_checkout_is_what_is_timed(tmp_path, capsys):
    """One whose gather does not exist says so."""
    for name in ("kernels", "reference", "perf"):
        (tmp_path / name).mkdir()
    (tmp_path / "pkm_triton").mkdir()
    (tmp_path / "pkm_triton" / "__init__.py").write_text("")
    assert main(["op", "gather_values", *QUICK, "--base", str(tmp_path)]) == 2
    assert "has no attribute 'gather_values'" in capsys.readouterr().err


def test_an_op_that_is_wrong_is_not_timed(capsys, monkeypatch):
    checks = [Check("Gather", "T=1", lambda: Outcome("FAIL", 1.0, 0.1))]
    monkeypatch.setattr(planning, "make_checks", lambda *_, **__: checks)
    assert main(["op", "gather_values", *QUICK]) == 1
    assert capsys.readouterr().out == "gather_values is not timed, for it is wrong: T=1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scatter"], "op: 'scatter' is unknown; allowed: product_key_topk"),
        (["gather_values", "--shape", "odd"], "shape: 'odd' is unknown; allowed: usual"),
        (["gather_values", "--set", "tokens"], "set: 'tokens' is not allowed; give SIZE=VALUE"),
        (["gather_values", "--set", "tokens=many"], "set: 'many' is no value for tokens"),
        (["gather_values", "--set", "tokens=0"], "tokens: 0 is too small"),
        (["gather_values", "--set", "dtype=int8"], "dtype: 'int8' is unknown"),
        (["product_key_topk", "--set", "query_dim=7"], "query_dim: 7 is odd"),
        (["gather_values", "--seconds", "0"], "seconds: 0.0 is not allowed"),
        (["gather_values", "--seconds", "inf"], "seconds: inf is not allowed"),
        (["gather_values", "--base", "/nowhere"], "base: '/nowhere' is no checkout"),
    ],
)
def test_a_mistake_is_one_clear_line_before_anything_is_run(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr(planning, "make_checks", None)
    assert main(["op", *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_bytes_are_those_of_the_tensors():
    shape = Shape(5, 2, 8, 4, 3, 24, "bfloat16")
    query, subkeys = torch.empty(5, 2, 4).bfloat16(), torch.empty(2, 2, 8, 2).bfloat16()
    scores, slots = torch.empty(5, 2, 3), torch.empty(5, 2, 3, dtype=torch.int32)
    # 30 reads of 64 slots drawn evenly find 64 · (1 - (63 / 64)^30) = 24.1 different ones.
    out, rows = torch.empty(5, 24).bfloat16(), torch.empty(24, 24).bfloat16()
    every = torch.empty(30, 24).bfloat16()
    table, keys = torch.empty(64, 24).bfloat16(), torch.empty(2, 64, 4).bfloat16()
    expected = {
        "product_key_topk": (query, subkeys, scores, slots),
        "product_key_topk_gradient": (query, subkeys, query, subkeys, scores, slots),
        "flat_key_topk": (query, keys, scores, slots),
        "gather_values": (rows, out, scores, slots),
        "gather_values_dense_gradient": (rows, table, out, scores, scores, slots),
        "gather_values_sparse_gradient": (rows, rows, out, scores, scores, slots),
        "flat_key_topk_gradient": (query, keys, query, keys, scores, slots),
        "sample_values": (rows, out, scores, slots),
        "scatter_values": (table, out, scores, slots),
        "sparse_adam": (*[every] * 3, *[every.float()] * 4),
        "scatter_adam": (out, scores, slots, *[rows] * 2, *[rows.float()] * 4),
    }
    assert set(expected) == set(OPS)
    for name, tensors in expected.items():
        assert OPS[name].bytes(name, shape) == sum(each.nbytes for each in tensors), name
    few = parse_shape("usual", ["num_subkeys=2", "top_k=1", "value_dim=8", "tokens=100"])
    assert few.num_slots == 4  # no more rows than there are


def test_the_report_has_medians_rates_and_their_ratio():
    shape = Shape(5, 2, 8, 4, 3, 24, "bfloat16")
    found = [Timed(1.5, [0.001, 0.002, 0.010]), Timed(2.0, [0.004] * 3)]
    lines = report("gather_values", shape, found, 1e9).splitlines()
    moved = OPS["gather_values"].bytes("gather_values", shape)
    share = moved / 0.002 / 1e9
    assert lines[2] == (
        f"this checkout: 2.0000 ms (1.0000 to 10.0000, 3 calls), {share:,.1f} GB/s, {share:.0%} of "
        "the copy, first call 1.50 s"
    )
    assert lines[4] == "this checkout / base: 0.500"


def test_the_copy_has_the_threads_of_the_op(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "check_threads", lambda threads: threads)
    monkeypatch.setattr(command, "_failures", lambda *_: [])
    monkeypatch.setattr(command, "time_checkouts", lambda *_, **__: [Timed(1.0, [1.0])])
    monkeypatch.setattr(
        roofline, "copied_here", lambda device: seen.append(torch.get_num_threads()) or 1e9
    )
    before = torch.get_num_threads()
    assert main(["op", "gather_values", "--device", "cpu", "--threads", str(before + 1)]) == 0
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_commit_is_that_of_the_checkout():
    assert commit() == "" or len(commit().rstrip("+")) >= 7
