"""Both lookups against brute force: exactly for small integers, by the tolerance rule otherwise."""

import dataclasses

import pytest
import torch
from oracle import all_flat_scores, all_product_scores, assert_distinct, assert_selects_exactly
from tolerance import assert_close_to_oracle

from pkm_triton import kernels
from pkm_triton.kernels.chip import INTERPRETER, as_if

# What numpy says of NaN and of infinities when it interprets.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:RuntimeWarning")
    for message in ("invalid value", "All-NaN slice", "overflow")
]

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

# T, H, d_q / 2, N, k, dtype of the query, of the sub-keys
PRODUCT_CASES = [
    (1, 1, 8, 1, 1, FLOAT32, FLOAT32),
    (1, 4, 33, 70, 32, BFLOAT16, BFLOAT16),
    (3, 2, 7, 40, 5, FLOAT32, FLOAT32),
    (17, 1, 20, 130, 33, BFLOAT16, FLOAT16),
    (20, 2, 8, 4, 16, FLOAT16, FLOAT16),
    (2, 1, 5, 9, 81, FLOAT32, BFLOAT16),
    (2, 1, 40, 300, 256, BFLOAT16, BFLOAT16),
    (4, 1, 24, 200, 100, BFLOAT16, BFLOAT16),
    (4, 1, 24, 200, 100, FLOAT32, FLOAT32),
    (300, 1, 16, 128, 8, BFLOAT16, BFLOAT16),
    (257, 2, 10, 700, 3, FLOAT16, FLOAT16),
    (20, 1, 12, 2050, 32, BFLOAT16, BFLOAT16),
    (20, 1, 12, 1090, 5, FLOAT32, FLOAT32),
    (20, 1, 12, 2100, 40, BFLOAT16, BFLOAT16),
]
FLAT_CASES = [
    (1, 1, 8, 1, 1, FLOAT32, FLOAT32),
    (3, 2, 20, 1000, 7, BFLOAT16, BFLOAT16),
    (20, 1, 33, 300, 32, FLOAT32, FLOAT16),
    (5, 1, 300, 90, 90, BFLOAT16, BFLOAT16),
    (150, 2, 300, 90, 30, FLOAT32, FLOAT32),
    (260, 1, 16, 640, 16, FLOAT16, FLOAT16),
    (20, 1, 16, 2500, 70, BFLOAT16, BFLOAT16),
]


@pytest.fixture(params=["few", "many"])
def path(request):
    """Shapes for few queries and for many, whatever their number: by a chip large or small."""
    count = 40 if request.param == "few" else 2
    with as_if(dataclasses.replace(INTERPRETER, multiprocessors=count)):
        yield request.param


def identify(value):
    return str(value).removeprefix("torch.")


def small_integers(*shape, dtype=FLOAT32, device="cpu"):
    """Values whose products and sums are exact in every dtype: ties abound."""
    return torch.randint(-4, 5, shape).to(device, dtype)


def scores_by_torch(query, subkeys):
    """The scores of all slots as plain PyTorch makes them, accumulated in float32."""
    first, second = query.float().chunk(2, dim=-1)
    rows = torch.einsum("thd,hnd->thn", first, subkeys[:, 0].float())
    columns = torch.einsum("thd,hnd->thn", second, subkeys[:, 1].float())
    return (rows[..., :, None] + columns[..., None, :]).flatten(-2)


@pytest.mark.parametrize("case", PRODUCT_CASES, ids=lambda c: "-".join(map(identify, c)))
def test_product_is_exact(case, path, device, guard):
    num_tokens, heads, width, num_subkeys, top_k, query_dtype, key_dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = small_integers(num_tokens, heads, 2 * width, dtype=query_dtype, device=device)
    subkeys = small_integers(heads, 2, num_subkeys, width, dtype=key_dtype, device=device)
    scores, slots = kernels.product_key_topk(query, subkeys, top_k)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def falling(num_keys, best, device):
    """Scores from the key `best` on, each far enough below the last to tell by a few bits."""
    keys = torch.logspace(20, -18, num_keys, device=device)
    return keys.roll(best).bfloat16().view(1, num_keys, 1)


@pytest.mark.parametrize("best", [0, 3900])
def test_keys_in_order_of_their_scores(best, path, device, guard):
    keys = falling(4000, best, device).float()
    # Of some queries only, and beside absent ones.
    query = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0], device=device).view(5, 1, 1)
    scores, slots = kernels.flat_key_topk(query, keys, 16)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))


def test_subkeys_in_order_of_their_scores(path, device, guard):
    subkeys = falling(2100, 0, device).unsqueeze(1).expand(1, 2, -1, 1).contiguous()
    query = torch.tensor([1.0, -1.0], device=device).bfloat16().view(2, 1, 1).expand(2, 1, 2)
    scores, slots = kernels.product_key_topk(query.contiguous(), subkeys, 16)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def test_infinite_and_missing_scores_of_many_keys(path, device, guard):
    keys = torch.randn(1, 1500, 1, device=device).bfloat16()
    keys[0, ::50], keys[0, 1::3] = torch.inf, -torch.inf
    query = torch.tensor([1.0, -1.0, torch.nan], device=device).view(3, 1, 1).bfloat16()
    scores, slots = kernels.flat_key_topk(query, keys, 32)
    assert_selects_exactly(scores[:2], slots[:2], all_flat_scores(query[:2], keys))
    assert scores[2].isnan().all()
    assert_distinct(slots, 1500)


@pytest.mark.parametrize("place", ["query", "keys"])
def test_infinite_elements_score_as_in_pytorch(place, path, device, guard):
    query = torch.tensor([[1.0, 0.5], [1 / 3, -3.0]]).view(2, 1, 2)
    keys = torch.tensor([[1.0, 2.0], [-1 / 3, 4.0], [7.0, 1 / 7]]).view(1, 3, 2)
    (query if place == "query" else keys)[0, 0, 0] = torch.inf
    scores, _ = kernels.flat_key_topk(query.to(device), keys.to(device), 3)
    expected = torch.einsum("thd,hkd->thk", query, keys).sort(-1, descending=True).values
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FLAT_CASES, ids=lambda c: "-".join(map(identify, c)))
def test_flat_is_exact(case, path, device, guard):
    num_tokens, heads, width, num_keys, top_k, query_dtype, key_dtype = case
    num_tokens = min(num_tokens, 20) if path == "few" else num_tokens
    query = small_integers(num_tokens, heads, width, dtype=query_dtype, device=device)
    keys = small_integers(heads, num_keys, width, dtype=key_dtype, device=device)
    scores, slots = kernels.flat_key_topk(query, keys, top_k)
    assert_selects_exactly(scores, slots, all_flat_scores(query, keys))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=identify)
def test_product_scores_are_accurate(dtype, path, device, guard):
    query = torch.randn(5, 2, 96, device=device).to(dtype)
    subkeys = torch.randn(2, 2, 200, 48, device=device).to(dtype)
    scores, slots = kernels.product_key_topk(query, subkeys, 32)
    everything = all_product_scores(query, subkeys)
    ours = everything.gather(-1, slots.long())
    same = scores_by_torch(query, subkeys)
    assert_distinct(slots, 200**2)
    assert_close_to_oracle(scores, ours, same.gather(-1, slots.long()))
    assert_close_to_oracle(scores, everything.topk(32).values, same.topk(32).values)


@pytest.mark.parametrize("width", [150, 270])
def test_float32_of_any_scale(width, path, device, guard):
    # Each query and each key of its own, far beyond what a float16 takes.
    query = torch.randn(9, 2, width, device=device)
    query *= torch.logspace(-15, 15, 9, device=device).view(9, 1, 1)
    keys = torch.randn(2, 70, width, device=device)
    keys *= torch.logspace(-15, 15, 70, device=device)[torch.randperm(70)].view(1, 70, 1)
    scores, slots = kernels.flat_key_topk(query, keys, 60)
    exact = all_flat_scores(query, keys).gather(-1, slots.long())
    same = torch.einsum("thd,hkd->thk", query, keys).gather(-1, slots.long())
    # Relative to what is summed, for sums may nearly cancel.
    size = all_flat_scores(query.abs(), keys.abs()).gather(-1, slots.long())
    assert_distinct(slots, 70)
    assert_close_to_oracle((scores / size).float(), exact / size, (same / size).float())


def test_products_beyond_float32(path, device, guard):
    query = torch.tensor([1e30, 0.0], device=device).view(1, 1, 2)
    keys = torch.tensor([[0.0, 1e30], [1e30, 0.0], [-1e30, 0.0]], device=device).view(1, 3, 2)
    scores, slots = kernels.flat_key_topk(query, keys, 3)
    assert scores.flatten().tolist() == [torch.inf, 0, -torch.inf]
    assert slots.flatten().tolist() == [1, 0, 2]


def test_ties_everywhere(path, device, guard):
    query = torch.zeros(5, 1, 16, device=device)
    subkeys = torch.randn(1, 2, 300, 8, device=device)
    scores, slots = kernels.product_key_topk(query, subkeys, 20)
    assert (scores == 0).all()
    assert_distinct(slots, 300**2)


def test_scores_far_apart(path, device, guard):
    # Too far for a narrow key: the wide path.
    query = torch.ones(2, 1, 4, device=device)
    subkeys = torch.logspace(-30, 30, 200, device=device).view(1, 1, 200, 1).repeat(1, 2, 1, 2)
    subkeys[:, :, ::2] *= -1
    scores, slots = kernels.product_key_topk(query, subkeys, 32)
    everything = scores_by_torch(query, subkeys)
    torch.testing.assert_close(scores, everything.topk(32).values, rtol=0, atol=0)
    torch.testing.assert_close(everything.gather(-1, slots.long()), scores, rtol=0, atol=0)


def test_ascending_scores_overflow_no_list(path, device, guard):
    # Every key beats all before it, so every key is appended.
    query = torch.ones(1, 1, 1, device=device)
    keys = torch.arange(3000.0, device=device).view(1, 3000, 1)
    scores, slots = kernels.flat_key_topk(query, keys, 4)
    assert slots.flatten().tolist() == [2999, 2998, 2997, 2996]
    assert scores.flatten().tolist() == [2999, 2998, 2997, 2996]


@pytest.mark.parametrize("element", [3, 11], ids=["first half", "second half"])
def test_nan_stays_in_its_row(element, path, device, guard):
    query = torch.randn(9, 2, 16, device=device)
    subkeys = torch.randn(2, 2, 80, 8, device=device)
    clean, _ = kernels.product_key_topk(query, subkeys, 9)
    query[7, 1, element] = torch.nan
    scores, slots = kernels.product_key_topk(query, subkeys, 9)
    assert scores[7, 1].isnan().all()
    assert_distinct(slots, 80**2)
    clean[7, 1] = scores[7, 1]
    assert torch.equal(clean.nan_to_num(), scores.nan_to_num())


def test_one_nan_key_spoils_its_head(path, device, guard):
    query = torch.randn(3, 2, 8, device=device)
    keys = torch.randn(2, 400, 8, device=device)
    keys[1, 333, 2] = torch.nan
    scores, slots = kernels.flat_key_topk(query, keys, 5)
    assert scores[:, 1].isnan().all()
    assert not scores[:, 0].isnan().any()
    assert_distinct(slots, 400)


def test_infinities(path, device, guard):
    # One element wide, and of few bits, so that a sub-key is its score.
    query = torch.ones(1, 1, 2, device=device)
    subkeys = torch.randn(1, 2, 40, 1, device=device).bfloat16().float()
    subkeys[0, 0, :3], subkeys[0, 1, 5:9] = torch.inf, -torch.inf
    scores, slots = kernels.product_key_topk(query, subkeys, 200)
    everything = scores_by_torch(query, subkeys).nan_to_num(
        nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
    )
    assert torch.equal(scores, everything.topk(200).values)
    assert_distinct(slots, 1600)


def test_no_token(device):
    query, subkeys = torch.empty(0, 2, 8, device=device), torch.randn(2, 2, 6, 4, device=device)
    scores, slots = kernels.product_key_topk(query, subkeys, 3)
    assert scores.shape == slots.shape == (0, 2, 3)
    scores, slots = kernels.flat_key_topk(query, torch.randn(2, 6, 8, device=device), 3)
    assert scores.shape == slots.shape == (0, 2, 3)


def test_unaligned_storage(path, device, guard):
    query = small_integers(5 * 12 + 1, device=device)[1:].view(5, 1, 12)
    subkeys = small_integers(2 * 50 * 6 + 1, device=device)[1:].view(1, 2, 50, 6)
    scores, slots = kernels.product_key_topk(query, subkeys, 6)
    assert_selects_exactly(scores, slots, all_product_scores(query, subkeys))


def test_any_order_of_programs_gives_the_same_bits(path, guarded):
    query, subkeys = torch.randn(2, 2, 16), torch.randn(2, 2, 70, 8)
    results = []
    for seed in range(20):
        with guarded(seed) as guard:
            results.append(kernels.product_key_topk(query, subkeys, 4))
        assert max(guard.programs.values()) > 1
    for scores, slots in results:
        assert torch.equal(scores, results[0][0])
        assert torch.equal(slots, results[0][1])


def test_a_chip_too_small_is_named(device):
    query, keys = torch.randn(1, 1, 8, device=device), torch.randn(1, 9, 8, device=device)
    with (
        as_if(dataclasses.replace(INTERPRETER, architecture="sm_80", shared=1 << 10)),
        pytest.raises(ValueError, match=r"sm_80 has 1024 bytes of shared memory"),
    ):
        kernels.flat_key_topk(query, keys, 3)


@pytest.mark.parametrize("top_k", [16, 600])
def test_equal_scores_of_the_lowest_keys(top_k, path, device, guard):
    # Ties everywhere, and more than fit into a list.
    keys = torch.zeros(1, 1200, 4, device=device)
    _, slots = kernels.flat_key_topk(torch.randn(2, 1, 4, device=device), keys, top_k)
    assert torch.equal(slots, torch.arange(top_k, device=device).int().expand(2, 1, -1))
