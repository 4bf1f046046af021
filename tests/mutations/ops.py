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
        "kernels/reads/runs.py",
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
        "kernels/flat_key_topk.py",
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
    "experts gated before their activation": Mutation(
        "pkm_triton/ops/expert_functions.py",
        "weights = gates * ACTIVATIONS[activation][0](products)\n        return",
        "weights = ACTIVATIONS[activation][0](gates * products)\n        return",
        "tests/layers/test_experts.py -k papers_formula",
    ),
    "the gate's gradient for the products'": Mutation(
        "pkm_triton/ops/expert_functions.py",
        "derivative(grad_weights * gates, products)",
        "derivative(grad_weights, products)",
        "tests/layers/test_experts.py -k test_gradients",
    ),
    "no table of inputs among those that learn faster": Mutation(
        "pkm_triton/experts.py",
        'table_names = ("inputs", "values")',
        'table_names = ("values",)',
        "tests/layers/test_experts.py -k forms_of_gradients",
    ),
    "a gate of the sum, not of the token": Mutation(
        "pkm_triton/ops/tables.py",
        "return gather_values(values, slots, weights, sparse_grad) * F.silu(gate)",
        "return F.silu(gather_values(values, slots, weights, sparse_grad) * gate)",
        "tests/layers/test_memory_plus.py -k papers_formula",
    ),
    "a gate that is a hundredth too large": Mutation(
        "kernels/gather_values.py",
        "out = out.to(dtype).to(tl.float32) * silu",
        "out = out.to(dtype).to(tl.float32) * silu * 1.01",
        "tests/kernels/test_gather_kernel.py -k silu",
    ),
    "a gate of the first token": Mutation(
        "kernels/gather_values.py",
        "gate_ptr + token * D_V + column",
        "gate_ptr + column",
        "tests/kernels/test_gather_kernel.py -k silu",
    ),
    "experts that inference does not gate": Mutation(
        "pkm_triton/experts.py",
        "return out if gate is None else out * F.silu(gate)",
        "return out",
        "tests/layers/test_memory_plus.py -k inference",
    ),
    "a gate of another dtype in the gather": Mutation(
        "pkm_triton/ops/tables.py",
        " or gate.dtype != values.dtype",
        "",
        "tests/kernels/test_layer.py -k inference",
    ),
    "padding through the gate": Mutation(
        "pkm_triton/gated_output.py",
        "x if padding is None else x.masked_fill(padding, 0)",
        "x",
        "tests/layers/test_memory_plus.py -k padding",
    ),
    "keys normalised over another length": Mutation(
        "pkm_triton/norms.py",
        'root = self.width**0.5 if self.kind == "rms" else 1.0',
        "root = 1.0",
        "tests/layers/test_memory_plus.py -k normalised",
    ),
    "halves and heads of lucidrains' queries exchanged": Mutation(
        "pkm_triton/convert/lucidrains.py",
        "weight.reshape(2, heads, width, dim).permute(1, 0, 2, 3)",
        "weight.reshape(heads, 2, width, dim)",
        "tests/convert/test_convert.py -k lucidrains",
    ),
    "a slot counted for each of its reads in a batch": Mutation(
        "pkm_triton/slot_counts.py",
        'self.batches_with.scatter_reduce_(0, flat, new, "amax")',
        "self.batches_with.index_add_(0, flat, seen.to(torch.int64))",
        "tests/layers/test_slot_counts.py -k test_counts",
    ),
    "frequencies without the one that is added": Mutation(
        "pkm_triton/slot_counts.py",
        "(background.num_batches + 1) / (frequency + 1)",
        "(background.num_batches + 1) / (frequency + 0.5)",
        "tests/layers/test_slot_counts.py -k formula",
    ),
    "slots that train read twice": Mutation(
        "pkm_triton/slot_tuning.py",
        "torch.where(ours, zero, weights).reshape(rows),",
        "weights.reshape(rows),",
        "tests/layers/test_slot_tuning.py -k same_as_before",
    ),
}
