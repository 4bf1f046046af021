"""Planted bugs of what combines candidates, and of the lookups' launches.

Each is a file, a text in it, what stands there instead, and the tests of which one must fail.
"""

KERNELS = "tests/kernels/test_lookup_kernels.py"
LIMITS = "tests/kernels/test_lookup_limits.py"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    # Pairs of ranks, and their sums.
    (
        "kernels/combine/plan.py",
        "skip = 0 if top_k > MOST_SORTED else 1",
        "skip = 0 if top_k >= MOST_SORTED else 1",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/combine/plan.py",
        "(top_k // (a + 1)).clamp(max=per_half) - skip",
        "(top_k // (a + 1)) - skip",
        [f"{KERNELS} -k 2-1-5-9-81"],
    ),
    (
        "kernels/combine/plan.py",
        "top_k // (a + 1)",
        "(top_k - 1) // (a + 1)",
        [f"{KERNELS} -k product_is_exact"],
    ),
    ("kernels/combine/plan.py", "right=True", "right=False", [f"{LIMITS} -k product_of_more"]),
    (
        "kernels/combine/plan.py",
        "min(power_of_two(top_k), MOST_SORTED)",
        "min(power_of_two(top_k), 2 * MOST_SORTED)",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/combine/kernels.py",
        "per_half = tl.minimum(top_k, num_subkeys)",
        "per_half = top_k + 0 * num_subkeys",
        [f"{KERNELS} -k 2-1-5-9-81"],
    ),
    (
        "kernels/combine/kernels.py",
        "best = sum_key(first_ptr, second_ptr, zero, rank, rank < per_half, ROWS)",
        "best = sum_key(first_ptr, second_ptr, zero, rank, rank < per_half - 1, ROWS)",
        [f"{LIMITS} -k one_half_ranks"],
    ),
    (
        "kernels/combine/kernels.py",
        "sum_key(first_ptr, second_ptr, rank, zero, rank < per_half, ROWS)",
        "sum_key(first_ptr, second_ptr, rank, zero, rank <= per_half, ROWS)",
        [f"{KERNELS} -k product_is_exact"],
    ),
    (
        "kernels/combine/kernels.py",
        'total = tl.where(total != total, float("-inf"), total)',
        "total = tl.where(total != total, 0.0, total)",
        [f"{LIMITS} -k infinite_sums"],
    ),
    (
        "kernels/combine/kernels.py",
        '    total = tl.where(total != total, float("-inf"), total)\n',
        "",
        [f"{LIMITS} -k infinite_sums"],
    ),
    (
        "kernels/combine/kernels.py",
        "key = tl.where(key < below, key, NOTHING)",
        "key = tl.where(key <= below, key, NOTHING)",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/combine/kernels.py",
        "(pair & 0xFFFF) * (2 * ROWS)",
        "(pair & 0xFF) * (2 * ROWS)",
        [f"{LIMITS} -k one_half_ranks"],
    ),
    (
        "kernels/combine/kernels.py",
        "half_lists = (half_row // R * splits)",
        "half_lists = (half_row // R)",
        [f"{KERNELS} -k 'product_is_exact and few'"],
    ),
    (
        "kernels/combine/kernels.py",
        "second_ptr = first_ptr + tl.cast(splits, tl.int64) * slots",
        "second_ptr = first_ptr + tl.cast(1, tl.int64) * slots",
        [f"{KERNELS} -k 'product_is_exact and few'"],
    ),
    (
        "kernels/combine/kernels.py",
        "spoilt = (best_first != best_first) | (best_second != best_second)",
        "spoilt = best_first != best_first",
        [f"{KERNELS} -k nan"],
    ),
    (
        "kernels/combine/kernels.py",
        "        mask &= token < num_tokens\n",
        "",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/combine/kernels.py",
        "mask = (token < num_tokens) & (rank < top_k)",
        "mask = (token < num_tokens) & (rank < TOP)",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/combine/kernels.py",
        "spoilt |= (leader",
        "spoilt = (leader",
        [f"{LIMITS} -k nan_of_one_split"],
    ),
    ("kernels/combine/kernels.py", "tl.where(spoilt, rank, slot)", "slot", [f"{KERNELS} -k nan"]),
    (
        "kernels/combine/kernels.py",
        "        below = tl.min(best, 1, keep_dims=True)\n        # NaN",
        "        # NaN",
        [f"{LIMITS} -k flat_of_more"],
    ),
    (
        "kernels/combine/kernels.py",
        "entry, mask=rank < per_half)",
        "entry)",
        [f"{LIMITS} -k product_of_more"],
    ),
    # Candidates in order.
    (
        "kernels/combine/sorting.py",
        "inside &= key < below",
        "inside &= key <= below",
        [f"{LIMITS} -k flat_of_more"],
    ),
    (
        "kernels/combine/sorting.py",
        "slot = start + column % WIDTH",
        "slot = start + column % C.top",
        [f"{LIMITS} -k flat_of_more"],
    ),
    (
        "kernels/combine/sorting.py",
        "list_of_split = list_ptr + split.to(tl.int64) * slots * ROWS",
        "list_of_split = list_ptr + split.to(tl.int64) * (slots - 1) * ROWS",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/combine/sorting.py",
        "mask=split < splits, other=0)",
        "mask=split <= splits, other=0)",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/combine/sorting.py",
        "inside = slot < count",
        "inside = slot <= count",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    # Launches.
    (
        "kernels/product_key_topk.py",
        "sorted_at=plan.capacity if spare else 0",
        "sorted_at=0",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/product_key_topk.py",
        "plan_selection(halves, books, per_half, spare)\n",
        "plan_selection(halves, books, per_half)\n",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/product_key_topk.py",
        "select(halves[turn], books",
        "select(halves[:plan.tokens][:scores[turn].shape[0]], books",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/flat_key_topk.py",
        "select(query[turn], keys",
        "select(query[:scores[turn].shape[0]], keys",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/product_key_topk.py",
        "tokens = scores[turn].shape[0]",
        "tokens = min(plan.tokens, num_tokens)",
        [f"{LIMITS} -k turns"],
    ),
    ("kernels/flat_key_topk.py", "splits=plan.splits,", "splits=1,", [f"{LIMITS} -k flat_of_more"]),
]
