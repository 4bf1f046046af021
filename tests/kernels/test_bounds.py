"""How sure a speculative bound is, against the exact distribution, and of which keys."""

import math

import pytest
import torch
import triton
import triton.language as tl

from pkm_triton.kernels.bounds import likely_enough
from pkm_triton.kernels.launch import tile_stride


@triton.jit
def likely_enough_kernel(out_ptr, seen, num_keys, TOP_K: tl.constexpr):
    tl.store(out_ptr, likely_enough(TOP_K, seen, num_keys))


def chance(enough, top_k, seen, num_keys):
    """That `enough` of the keys seen are among the top_k - 1 best: then a bound is too high."""
    ways = sum(
        math.comb(top_k - 1, x) * math.comb(num_keys - top_k + 1, seen - x)
        for x in range(enough, min(top_k - 1, seen) + 1)
    )
    return ways / math.comb(num_keys, seen)


@pytest.mark.parametrize("num_keys", [1025, 2048, 4096, 20_000])
@pytest.mark.parametrize("top_k", [1, 3, 8, 20, 32])
def test_bounds_are_seldom_too_high(top_k, num_keys, device):
    out = torch.empty((), dtype=torch.int32, device=device)
    for seen in (512, 640, 1280, 2560, 10_240):
        if seen < num_keys:
            likely_enough_kernel[(1,)](out, seen, num_keys, top_k)
            enough = out.item()
            assert 1 <= enough <= top_k
            assert chance(enough, top_k, seen, num_keys) < 1e-5
            # Far fewer than a bound that is sure would take.
            if top_k == 32 and num_keys >= 4096 and seen <= 640:
                assert enough <= 18


@pytest.mark.parametrize("count", [1, 2, 9, 17, 32, 63, 64, 510, 1000, 65_536])
def test_strides_visit_all_tiles_and_spread(count):
    step, rest = divmod(tile_stride(64 * count - 5, 64), 64)
    assert rest == 0
    assert 0 < step <= count
    visited = [i * step % count for i in range(count)]
    assert sorted(visited) == list(range(count))
    # Of any few in a row no two are near each other.
    for few in (3, 5, 8):
        if count >= 8 * few:
            places = sorted(visited[:few])
            gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + count], strict=True)]
            assert min(gaps) > count // (4 * few)
