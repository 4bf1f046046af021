"""What lookups meet at their limits: lists that fill, turns, more reads than are sorted at once."""

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import triton
from oracle import all_flat_scores, all_product_scores, assert_distinct, assert_selects_exactly
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from pkm_triton import kernels
from pkm_triton.kernels import chip
from pkm_triton.kernels.reads.blocks import choose_blocks
from pkm_triton.kernels.select import plan as selection

FILES = sorted(f for f in Path(kernels.__file__).parent.rglob("*.py") if "tl.dot(" in f.read_text())
flat = importlib.import_module("pkm_triton.kernels.flat_key_topk")

# What numpy says of NaN and of absent rows when it interprets.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:RuntimeWarning")
    for message in ("invalid value", "All-NaN slice", "overflow")
]


@pytest.fixture
def small_chip():
    """Shapes for many queries."""
    with chip_of(1):
        yield


def chip_of(multiprocessors):
    return chip.as_if(dataclasses.replace(chip.INTERPRETER, multiprocessors=multiprocessors))


def small_integers(*shape, device):
    return torch.randint(-4, 5, shape, device=device).float()


@pytest.mark.parametrize("keys", ["product", "flat"])
def test_turns(keys, small_chip, device, guard, monkeypatch):
    monkeypatch.setattr(selection, "LIST_BYTES", 1)
    query = small_integers(150, 1, 6, device=device)
    if keys == "product":
        table = small_integers(1, 2, 40, 3, device=device)
        assert len(selection.plan_selection(query, table[0], 4).turns(150)) == 2
        scores, slots = kernels.product_key_topk(query, table, 4)
        assert_selects_exactly(scores, slots, all_product_scores(query, table))
    else:
        table = small_integers(1, 70, 6, device=device)
        scores, slots = kernels.flat_key_topk(query, table, 4)
        assert_selects_exactly(scores, slots, all_flat_scores(query, table))


@pytest.mark.parametrize("multiprocessors", [1, 20], ids=["many", "few"])
@pytest.mark.parametrize("top_k", [512, 530])
def test_product_of_more_reads_than_are_sorted_at_once(top_k, multiprocessors, device, guard):
    query = torch.ones(1, 1, 2, device=device)
    # All sums differ, and the best of both halves are at the end.
    steps = torch.arange(560.0, device=device)
    subkeys = torch.stack([steps * 1024, steps + 0.5]).view(1, 2, 560, 1)
    subkeys[0, 1, 540:] *= 512
    with chip_of(multiprocessors):
        scores, slots = kernels.product_key_topk(query, subkeys, top_k)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def test_one_half_ranks_beyond_a_byte(small_chip, device, guard):
    query = torch.ones(1, 1, 2, device=device)
    subkeys = torch.stack([torch.arange(300.0) * 1000, torch.arange(300.0).flip(0)])
    subkeys = subkeys.view(1, 2, 300, 1).to(device)
    for each in (subkeys, subkeys.flip(1).contiguous()):
        scores, slots = kernels.product_key_topk(query, each, 300)
        assert_selects_exactly(scores, slots, all_product_scores(query, each))


@pytest.mark.parametrize("multiprocessors", [1, 4], ids=["many", "few"])
def test_flat_of_more_reads_than_are_sorted_at_once(multiprocessors, device, guard):
    query = torch.tensor([1.0, -1.0], device=device).view(2, 1, 1)
    keys = torch.randperm(1300, device=device).float().view(1, 1300, 1)
    with chip_of(multiprocessors):
        scores, slots = kernels.flat_key_topk(query, keys, 600)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))


@pytest.mark.parametrize("place", [1200, 1299])
def test_a_nan_of_one_split_in_all_turns(place, device, guard):
    query = torch.ones(1, 1, 1, device=device)
    keys = torch.randn(1, 1300, 1, device=device)
    keys[0, place] = torch.nan
    with chip_of(4):
        scores, slots = kernels.flat_key_topk(query, keys, 600)
    assert scores.isnan().all()
    assert_distinct(slots, 1300)


@pytest.mark.parametrize("leaders", [7, 8, 9])
@pytest.mark.parametrize("others", [0.0, -0.0, -1.0])
def test_two_scores_of_all_keys(leaders, others, small_chip, device, guard):
    # Of the keys with the lower score as many must be found as the leaders lack.
    keys = torch.full((1, 800, 1), others, device=device)
    # One a tile at most but for two, all in tiles of the first look.
    keys[0, [0, 1, 130, 131, 260, 390, 520, 650, 660][:leaders]] = 1
    scores, slots = kernels.flat_key_topk(torch.ones(1, 1, 1, device=device), keys, 8)
    assert_selects_exactly(scores, slots, all_flat_scores(torch.ones(1, 1, 1), keys))


def test_ties_with_a_threshold_raised_by_keys_still_to_come(small_chip, device, guard):
    keys = torch.zeros(2048, device=device)
    # What the first look sees, the second half of it again later.
    keys.view(8, 256)[:, :64] = 1
    keys[64:68] = keys[1284:1288] = 2
    scores, slots = kernels.flat_key_topk(
        torch.ones(1, 1, 1, device=device), keys.view(1, -1, 1), 8
    )
    assert scores.flatten().tolist() == [2] * 8
    assert slots.flatten().tolist() == [*range(64, 68), *range(1284, 1288)]


@pytest.mark.parametrize(
    ("multiprocessors", "columns"),
    [(1, [c for c in range(64) if c % 8 < 2]), (3, list(range(16, 32)))],
    ids=["many", "few"],
)
def test_the_best_keys_in_columns_of_some_threads(multiprocessors, columns, device, guard):
    # A row's threads share its threshold: what one of them holds is no measure of it.
    keys = -torch.arange(1536.0, device=device)
    best = torch.tensor([*columns, *(64 + column for column in columns)], device=device)
    keys[best] = torch.arange(32.0, 0, -1, device=device)
    with chip_of(multiprocessors):
        scores, slots = kernels.flat_key_topk(
            torch.ones(1, 1, 1, device=device), keys.view(1, -1, 1), 32
        )
    assert scores.flatten().tolist() == list(range(32, 0, -1))
    assert slots.flatten().tolist() == best.tolist()


def test_infinite_sums_of_both_signs(small_chip, device, guard):
    half = torch.tensor([torch.inf, 0, -torch.inf], device=device).view(1, 1, 3, 1)
    query = torch.ones(1, 1, 2, device=device)
    scores, _ = kernels.product_key_topk(query, half.repeat(1, 2, 1, 1), 9)
    assert scores.flatten().tolist() == [torch.inf] * 3 + [0] + [-torch.inf] * 5


def test_a_row_that_fills_no_list_beside_one_that_does(small_chip, device, guard, monkeypatch):
    # Lists as beyond 128 reads, cut exactly; a row's by what it holds itself.
    def without_a_threshold(*args):
        plan = selection.plan_selection(*args)
        shape = plan.shape._replace(look=0)
        return dataclasses.replace(plan, shape=shape, capacity=128, slots=128)

    monkeypatch.setattr(flat, "plan_selection", without_a_threshold)
    ascending = torch.arange(280.0, device=device)
    late = -ascending
    late[256:] += 500
    keys = torch.stack([ascending, late], dim=-1).unsqueeze(0)
    # The last has all of its scores alike, of which the lowest keys win.
    query = torch.eye(3, 2, device=device).unsqueeze(1)
    scores, slots = kernels.flat_key_topk(query, keys, 5)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))
    assert slots[2].flatten().tolist() == list(range(5))


@pytest.mark.parametrize("width", [5, 300])
def test_what_lies_beside_a_row_is_not_in_it(width, small_chip, device, guard):
    # Zeros of a mask do not silence what is not finite.
    query = small_integers(3, 1, width, device=device)
    query[1] = torch.nan
    keys = small_integers(2, 30, width, device=device)
    keys[1] = torch.nan
    scores, slots = kernels.flat_key_topk(query, keys[:1], 4)
    expected = all_flat_scores(query, keys[:1])
    assert_selects_exactly(scores[::2], slots[::2], expected[::2])
    scores, slots = kernels.flat_key_topk(query.expand(3, 2, -1).contiguous(), keys, 4)
    assert_selects_exactly(scores[::2, :1], slots[::2, :1], expected[::2])


class Stop(Exception):
    """Ends a launch after a program."""


# T, H, N: the last program's first query, head's first key, and tile's first key past int32.
@pytest.mark.parametrize(
    "case", [((1 << 19) + 8, 1, 64), (1, 3, (1 << 18) + 9), (1, 1, (1 << 19) + 200)], ids=str
)
def test_inputs_past_int32(case, guarded, monkeypatch):
    num_tokens, heads, num_keys = case
    dim = 1 << 12
    # Pages that nobody touches take no memory.
    query = torch.empty(num_tokens, heads, dim, dtype=torch.bfloat16)
    keys = torch.empty(heads, num_keys, dim, dtype=torch.bfloat16)
    query[-16:], keys[-1, -64:] = 0, 0
    query[-1, -1, -1] = keys[-1, -1, -1] = 2
    with chip_of(10**7):
        plan = selection.plan_selection(query, keys, 1)
    blocks = triton.cdiv(num_tokens, 16)
    programs = blocks * heads * plan.splits
    counts = torch.empty(blocks, heads, plan.splits, 16, dtype=torch.int32)
    lists = torch.empty(blocks, heads, plan.splits, plan.slots, 16, dtype=torch.int64)
    set_index = interpreter.InterpreterBuilder.set_grid_idx

    def last_alone(builder, x, y, z):
        if x > 0:
            raise Stop
        set_index(builder, programs - 1, y, z)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", last_alone)
    with guarded(), pytest.raises(InterpreterError, match="Stop"):
        selection.select(query, keys, 1, plan, lists, counts)
    row = (num_tokens - 1) % 16
    found = lists[-1, -1, -1, : counts[-1, -1, -1, row], row]
    scores, index = (found >> 32).int().view(torch.float32), found & 0xFFFFFFFF
    assert scores.max() == 4
    assert index[scores.argmax()] == num_keys - 1


@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_dtypes_are_scored_in_float32(mixed, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    query = torch.empty(8, 1, 16, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(1, 64, 16, dtype=torch.float16 if mixed else query.dtype, device="meta")
    assert selection.choose_select_shape(query, keys, 4).upcast == mixed


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_product_states_its_precision(file):
    # Only a GPU multiplies float32 in tf32 by default; the interpreter would not show it.
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        if ast.unparse(call.func) == "tl.dot":
            assert "input_precision" in [keyword.arg for keyword in call.keywords], call.lineno


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_float32_is_multiplied_as_exactly_as_can_be(architecture):
    query = torch.empty(8, 1, 16, device="meta")
    with chip.as_if(chip.CHIPS[architecture]):
        shape = selection.choose_select_shape(query, query.view(1, 8, 16), 4)
    assert shape.precision == ("ieee" if architecture == "gfx942" else "tf32x3")


def test_chips_are_assumed_inside_of_others():
    first, second = chip.CHIPS["sm_80"], chip.CHIPS["sm_90"]
    before = chip.chip_of(torch.device("cpu"))
    with chip.as_if(first):
        with chip.as_if(second):
            assert chip.chip_of(torch.device("cpu")) == second
        assert chip.chip_of(torch.device("cpu")) == first
    assert chip.chip_of(torch.device("cpu")) == before


@pytest.mark.parametrize(
    ("module", "kernel"),
    [
        ("select.kernel", "select_kernel"),
        ("combine.kernels", "sort_kernel"),
        ("combine.kernels", "combine_kernel"),
    ],
)
def test_no_number_compiles_anew(module, kernel):
    function = getattr(importlib.import_module(f"pkm_triton.kernels.{module}"), kernel).fn
    (definition,) = ast.parse(inspect.getsource(function)).body
    (told,) = definition.decorator_list[0].keywords
    numbers = [a.arg for a in definition.args.args if a.arg.islower()]
    assert [n for n in numbers if not n.endswith("_ptr")] == ast.literal_eval(told.value)


@pytest.mark.parametrize("shared", [227, 99, 48])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("upcast", [False, True])
def test_gradients_ask_for_no_more_shared_memory_than_there_is(upcast, architecture, shared):
    query = torch.empty(4096, 1, 512, device="meta")
    known = chip.CHIPS[architecture]
    small = dataclasses.replace(known, shared=shared << 10)
    with chip.as_if(small):
        blocks = choose_blocks(query, upcast)
    size = 4 if upcast else 2
    assert all(each.shared(small, size) <= small.shared for each in blocks)
    if shared == 227:  # nothing is given up that fits
        assert max(each.stages for each in blocks) == (2 if upcast else 3)


def test_gradients_refuse_a_chip_too_small():
    query = torch.empty(4096, 1, 512, device="meta")
    with (
        chip.as_if(chip.Chip("sm_80", 108, 4 << 10)),
        pytest.raises(ValueError, match="sm_80 has 4096 bytes of shared memory, but the gradients"),
    ):
        choose_blocks(query, False)


# What compilers made of each architecture's shapes: (query's, sub-keys'), bfloat16.
COMPILED_SHARED = {
    "sm_86": (86016, 47104),
    "sm_90": (118784, 131072),
    "sm_100": (135184, 63504),
    "gfx942": (16384, 32768),
}


@pytest.mark.parametrize("architecture", COMPILED_SHARED)
def test_shared_memory_of_gradients_is_not_estimated_too_low(architecture):
    query = torch.empty(16384, 4, 512, device="meta")
    with chip.as_if(chip.CHIPS[architecture]):
        blocks = choose_blocks(query, False)
    found = [each.shared(chip.CHIPS[architecture], 2) for each in blocks]
    assert all(a >= b for a, b in zip(found, COMPILED_SHARED[architecture], strict=True)), found
