"""Bugs in the ops, the reference and the kernels on a table, and the tests that find each."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`wrong` in the place of `right` in a file of the repository, which `tests` must find."""

    file: str
    right: str
    wrong: str
    tests: str


MUTATIONS = {
    "partial sums of the gather in the table's dtype": Mutation(
        "kernels/gather_values.py",
        "out += tl.sum(rows * weight[:, None], 0)",
        "out += tl.sum(rows * weight[:, None], 0).to(out_ptr.dtype.element_ty).to(tl.float32)",
        "tests/kernels/test_gather_kernel.py -k rounded_once",
    ),
    "a run counted for one tile of reads": Mutation(
        "kernels/runs.py",
        "for first in tl.range(0, length, BLOCK, num_stages=1):",
        "for first in tl.range(0, tl.minimum(length, BLOCK), BLOCK, num_stages=1):",
        "tests/kernels/test_scatter_values.py -k runs_longer",
    ),
    "places of scattered rows in int32": Mutation(
        "kernels/scatter_values.py",
        "tl.store(row_sums_ptr + place * D_V + column, row, mask=mask)",
        "tl.store(row_sums_ptr + place.to(tl.int32) * D_V + column, row, mask=mask)",
        "tests/kernels/test_scatter_values.py -k rows_past_int32",
    ),
    "flat keys of all heads in one table": Mutation(
        "kernels/flat_key_topk_backward.py",
        "at_a_time = min(heads, (2**31 - 1) // num_keys)",
        "at_a_time = heads",
        "tests/kernels/test_topk_backward.py -k int32_counts",
    ),
    "a program's first tile of reads alone": Mutation(
        "kernels/sample_values.py",
        "tl.minimum(first_read + READS, R)",
        "tl.minimum(first_read + BLOCK_R, R)",
        "tests/kernels/test_sample_kernel.py -k dealt_out",
    ),
    "lookups follow the process's matmul precision": Mutation(
        "reference/topk.py",
        'if a.dtype == torch.float32 and allowed not in ("none", "ieee"):',
        'if a.dtype == torch.float32 and allowed == "":',
        "tests/ops/test_product_key_topk.py -k global_setting",
    ),
    "NaN in the second half unseen": Mutation(
        "reference/product_key_topk.py",
        "leaders.isnan().any(-1, keepdim=True)",
        "leaders[..., :1].isnan()",
        "tests/ops/test_product_key_topk.py -k nan_stays",
    ),
    "infinite weights in two parts": Mutation(
        "reference/gather_values.py",
        "weights.clamp(-largest, largest).to(dtype)",
        "weights.to(dtype)",
        "tests/ops/test_gather_values.py -k infinite",
    ),
    "small weights in two parts of float16": Mutation(
        "reference/gather_values.py",
        "(peak >= 2**-8) &",
        "(peak >= 0) &",
        "tests/ops/test_gather_values.py -k any_size",
    ),
    "bags of a later chunk from the first read on": Mutation(
        "reference/scatter_values.py",
        "(bounds - begin).to(index)",
        "(bounds - bounds[0] * 0).to(index)",
        "tests/ops/test_gather_values.py -k widened",
    ),
    "the weights' tangent forgotten": Mutation(
        "pkm_triton/ops/table_functions.py",
        "None if weights_t is None else gather(values, slots, weights_t, ctx.dtype)",
        "None",
        "tests/ops/test_derivatives.py -k forward_mode",
    ),
    "slots out of range in the next table of a batch": Mutation(
        "pkm_triton/ops/rules.py",
        "return torch.where(inside, slots + first[:, None, None], -1)",
        "return slots + first[:, None, None] + 0 * inside",
        "tests/ops/test_derivatives.py -k out_of_range",
    ),
    "rows that a sparse gradient lacks": Mutation(
        "pkm_triton/ops/table_functions.py",
        "places.where(rows[places] == slots, values.shape[0] - 1)",
        "places",
        "tests/ops/test_derivatives.py -k other_rows",
    ),
    "batched gradients in one pass": Mutation(
        "pkm_triton/ops/modes.py",
        "return torch.is_grad_enabled() or transformed()",
        "return torch.is_grad_enabled()",
        "tests/ops/test_derivatives.py -k one_call",
    ),
    "a second derivative in one pass": Mutation(
        "pkm_triton/ops/modes.py",
        "return torch.is_grad_enabled() or transformed()",
        "return transformed()",
        "tests/ops/test_derivatives.py -k second_derivatives",
    ),
    "the batch of a lookup in another dimension": Mutation(
        "pkm_triton/ops/lookups.py",
        "return (scores, slots), (1, 1)",
        "return (scores.transpose(0, 1).contiguous(), slots), (1, 1)",
        "tests/ops/test_derivatives.py -k vmap_equals",
    ),
    "the sub-keys' rows of one half": Mutation(
        "pkm_triton/ops/lookups.py",
        "slots = torch.stack([slots // num_keys, slots % num_keys], dim=2)",
        "slots = torch.stack([slots // num_keys, slots // num_keys], dim=2)",
        "tests/ops/test_derivatives.py -k functional_gradients",
    ),
    "a block of backend closed in place of the last": Mutation(
        "pkm_triton/_backend.py",
        "blocks.remove(self)",
        "blocks.pop(0)",
        "tests/package/test_backend.py -k out_of_order",
    ),
    "a block of backend for every thread": Mutation(
        "pkm_triton/_backend.py",
        "_for_good.remove(self)",
        "pass",
        "tests/package/test_backend.py -k entered_twice",
    ),
}
