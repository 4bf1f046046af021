"""Planted bugs of what selects the lookups' candidates.

Each is a file, a text in it, what stands there instead, and the tests of which one must fail.
"""

KERNELS = "tests/kernels/test_lookup_kernels.py"
LIMITS = "tests/kernels/test_lookup_limits.py"
BYTES = "tests/kernels/test_lookup_bytes.py"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    # The lists of candidates, and their entries.
    (
        "kernels/select/candidates.py",
        "at = (count + before - 1)",
        "at = (count + before)",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/select/candidates.py",
        "return count + total",
        "return count + own",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/select/candidates.py",
        "valid = at < count[",
        "valid = at <= count[",
        [f"{LIMITS} -k two_scores"],
    ),
    (
        "kernels/select/candidates.py",
        "sort_key(score, key) >= least[",
        "sort_key(score, key) > least[",
        [f"{LIMITS} -k fills_no_list"],
    ),
    (
        "kernels/select/candidates.py",
        "order_bits(threshold).to(tl.int64) << 32, count",
        "((order_bits(threshold).to(tl.int64) + 1) << 32), count",
        [f"{KERNELS} -k 1090"],
    ),
    (
        "kernels/select/candidates.py",
        "threshold = tl.maximum(threshold, key_score(least))",
        "threshold = key_score(least)",
        [f"{LIMITS} -k fills_no_list"],
    ),
    (
        "kernels/select/candidates.py",
        "keep = valid & (sort_key(score, key) >= least[:, None, :])",
        "keep = sort_key(score, key) >= least[:, None, :]",
        [f"{LIMITS} -k fills_no_list"],
    ),
    ("kernels/select/entries.py", "(~index).to(tl.uint32)", "(~index)", [f"{LIMITS} -k turns"]),
    (
        "kernels/select/entries.py",
        "return bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "return bits",
        [f"{KERNELS} -k 300-90-90"],
    ),
    # The kernel that selects.
    (
        "kernels/select/kernel.py",
        "tl.where(reached >= top_k, above",
        "tl.where(reached >= top_k - 1, above",
        [f"{LIMITS} -k two_scores"],
    ),
    (
        "kernels/select/kernel.py",
        "tl.where(reached >= top_k, above, threshold)",
        "above",
        [f"{LIMITS} -k two_scores"],
    ),
    (
        "kernels/select/kernel.py",
        "limit_of(threshold, count - before, top_k)",
        "limit_of(threshold, count, top_k)",
        [f"{LIMITS} -k still_to_come"],
    ),
    (
        "kernels/select/kernel.py",
        "before = tl.where(raised > threshold, count, before)",
        "before = tl.where(raised > threshold, before, before)",
        [f"{LIMITS} -k still_to_come"],
    ),
    (
        "kernels/select/kernel.py",
        "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
        "tl.maximum(a, b)",
        [f"{KERNELS} -k nan"],
    ),
    (
        "kernels/select/kernel.py",
        "lists = (block * heads + head)",
        "lists = (head * blocks + block)",
        [f"{KERNELS} -k 150-2-300"],
    ),
    (
        "kernels/select/kernel.py",
        "keys_ptr += tl.cast(head, tl.int64) * num_keys * S.dim",
        "keys_ptr += head * num_keys * S.dim",
        [f"{LIMITS} -k past_int32"],
    ),
    (
        "kernels/select/kernel.py",
        "end = tl.minimum(first + span, num_keys)",
        "end = first + span",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/select/kernel.py",
        "tl.minimum(block * ROWS + tl.arange(0, ROWS), num_tokens - 1)",
        "block * ROWS + tl.arange(0, ROWS)",
        [f"{LIMITS} -k turns"],
    ),
    (
        "kernels/select/kernel.py",
        "row = (token.to(tl.int64) * heads",
        "row = (token * heads",
        [f"{LIMITS} -k past_int32"],
    ),
    (
        "kernels/select/kernel.py",
        "stride = tl.cdiv(whole, LOOK * TILE) * TILE",
        "stride = tl.cdiv(whole, LOOK)",
        [f"{KERNELS} -k in_order"],
    ),
    (
        "kernels/select/kernel.py",
        "tl.minimum(tiles, (capacity - longest) // TILE)",
        "tl.minimum(tiles, tl.cdiv(capacity - longest, TILE))",
        [f"{LIMITS} -k fills_no_list"],
    ),
    (
        "kernels/select/kernel.py",
        "longest = tl.max(count)\n        full",
        "longest = tl.min(count)\n        full",
        [f"{LIMITS} -k fills_no_list"],
    ),
    ("kernels/select/kernel.py", ") & (key < end)", ") & (key <= end)", [f"{LIMITS} -k turns"]),
    (
        "kernels/select/kernel.py",
        '@triton.jit(do_not_specialize=["num_tokens", "num_keys",',
        '@triton.jit(do_not_specialize=["num_tokens",',
        [f"{LIMITS} -k compiles_anew"],
    ),
    (
        "kernels/select/kernel.py",
        "maxima = maximum_or_nan(maxima, score)\n"
        "            key = fragment_columns(at, ROWS, TILE, THREADS)\n"
        "            keep = (score",
        "key = fragment_columns(at, ROWS, TILE, THREADS)\n            keep = (score",
        [f"{LIMITS} -k nan_of_one_split"],
    ),
    # A thread's columns and rows.
    (
        "kernels/select/layout.py",
        "(start + thread // (2 * ROWS) * (4 * C)",
        "(start + thread // (2 * ROWS) * 4",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/select/layout.py",
        "most = tl.max(tl.max(y, 3, keep_dims=True), 1, keep_dims=True)",
        "most = tl.max(y, 3, keep_dims=True)",
        [f"{LIMITS} -k some_threads"],
    ),
    (
        "kernels/select/layout.py",
        "        before += tl.cumsum(four, 1) - four\n",
        "",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/select/layout.py",
        "== 1, four - two, 0)",
        "== 1, two, 0) * 0",
        [f"{LIMITS} -k turns"],
    ),
    # Scores of a tile.
    (
        "kernels/select/scoring.py",
        "query = tl.load(query_ptr + row * DIM + d, mask=d < DIM, other=0.0)",
        "query = tl.load(query_ptr + row * DIM + d)",
        [f"{LIMITS} -k beside"],
    ),
    (
        "kernels/select/scoring.py",
        "keys = tl.load(tile_ptr + place, mask=d < DIM, other=0.0)",
        "keys = tl.load(tile_ptr + place)",
        [f"{LIMITS} -k beside"],
    ),
    (
        "kernels/select/scoring.py",
        "keys = tl.load(tile_ptr + place + first, mask=inside, other=0.0)",
        "keys = tl.load(tile_ptr + place + first)",
        [f"{LIMITS} -k beside"],
    ),
    (
        "kernels/select/scoring.py",
        "column < end - start, column",
        "column <= end - start, column",
        [f"{LIMITS} -k beside"],
    ),
    (
        "kernels/select/scoring.py",
        "column = tl.maximum(tl.where(column < end - start, column, column - TILE), -start)",
        "column = tl.where(column < end - start, column, column - TILE)",
        [f"{LIMITS} -k beside"],
    ),
    (
        "kernels/select/scoring.py",
        "scores = tl.dot(query, keys, input_precision=PRECISION)",
        "scores = tl.dot(query, keys)",
        [f"{LIMITS} -k states_its_precision"],
    ),
    (
        "kernels/select/scoring.py",
        "scores = tl.dot(part, keys, scores, input_precision=PRECISION)",
        "scores = tl.dot(part, keys, scores)",
        [f"{LIMITS} -k states_its_precision"],
    ),
    # The threshold.
    (
        "kernels/select/threshold.py",
        "low = tl.maximum(threshold, -row_max(-tl.min(maxima, 1), ROWS))",
        "low = tl.maximum(threshold, row_max(tl.min(maxima, 1), ROWS))",
        [f"{LIMITS} -k some_threads"],
    ),
    (
        "kernels/select/threshold.py",
        "row_sum(reach, ROWS) >= top_k",
        "row_sum(reach, ROWS) >= top_k - 1",
        [f"{KERNELS} -k 'flat_is_exact and many'"],
    ),
    (
        "kernels/select/threshold.py",
        "tl.where(maxima >= low[:, None, :], maxima,",
        "tl.where(maxima > low[:, None, :], maxima,",
        [f"{LIMITS} -k two_scores"],
    ),
    (
        "kernels/select/threshold.py",
        "least = -row_max(-least, ROWS)",
        "least = row_max(least, ROWS)",
        [f"{KERNELS} -k 'flat_is_exact and many'"],
    ),
    # Shapes, and how work is dealt out.
    (
        "kernels/select/plan.py",
        "    splits = triton.cdiv(num_keys, span)\n    # As many",
        "    # As many",
        [f"{KERNELS} -k 'flat_is_exact and few'"],
    ),
    (
        "kernels/select/plan.py",
        "slots = capacity + spare",
        "slots = capacity",
        [f"{LIMITS} -k product_of_more"],
    ),
    (
        "kernels/select/plan.py",
        "lists = triton.cdiv(tokens, self.shape.rows) * heads",
        "lists = max(1, tokens // self.shape.rows) * heads",
        [f"{KERNELS} -k 17-1-20"],
    ),
    ("kernels/select/plan.py", "upcast=wide or triton", "upcast=triton", [f"{LIMITS} -k mixed"]),
    (
        "kernels/chip.py",
        "query.dtype != keys.dtype or query.dtype == torch.float32",
        "query.dtype == torch.float32",
        [f"{LIMITS} -k mixed"],
    ),
    ("kernels/chip.py", 'return "tf32x3" if', 'return "tf32" if', [f"{LIMITS} -k exactly_as"]),
    (
        "kernels/chip.py",
        "previous, _assumed = _assumed, chip",
        "previous, _assumed = None, chip",
        [f"{LIMITS} -k assumed"],
    ),
    (
        "kernels/select/traffic.py",
        "times = plan.splits if dim <= shape.block_d else tiles",
        "times = plan.splits",
        [BYTES],
    ),
    (
        "kernels/select/traffic.py",
        "whole * shape.tile > 2 * top_k",
        "whole * shape.tile > top_k",
        [BYTES],
    ),
]
