"""Bugs in the ahead-of-time compiler and in the perf harness, and the tests that find each."""

from mutations.ops import Mutation

WARM_UP = "tests/kernels/test_warm_up.py"
LIMITS = "tests/kernels/test_lookup_limits.py"

MUTATIONS = {
    "a step in half precision planned without its copy": Mutation(
        "pkm_triton/compiling.py",
        'master = group["rounding"] == "master"',
        "master = False",
        f"{WARM_UP} -k options_of_a_step",
    ),
    "a step counted on the device planned as one on the host": Mutation(
        "pkm_triton/compiling.py",
        'number = torch.empty((), device="meta") if group["capturable"] else 1',
        "number = 1",
        f"{WARM_UP} -k options_of_a_step",
    ),
    "sparse gradients planned as dense ones": Mutation(
        "pkm_triton/compiling.py",
        "if layer.sparse_grad is True and layer.values.requires_grad:",
        'if layer.sparse_grad == "sparse" and layer.values.requires_grad:',
        f"{WARM_UP} -k training_step",
    ),
    "evaluation planned with a backward pass": Mutation(
        "pkm_triton/compiling.py",
        "        if layer.training:\n            scores",
        "        if True:\n            scores",
        f"{WARM_UP} -k no_backward_pass",
    ),
    "shared memory of loads ahead not counted": Mutation(
        "kernels/reads/blocks.py",
        "needed = tiles * loaded + tile",
        "needed = loaded + tile",
        f"{LIMITS} -k estimated_too_low",
    ),
    "loads ahead given up where they fit": Mutation(
        "kernels/reads/blocks.py",
        "for stages in range(self.stages, 0, -1):",
        "for stages in range(1, self.stages + 1):",
        f"{LIMITS} -k ask_for_no_more",
    ),
    "what the cache had counted as compiled": Mutation(
        "kernels/launches.py",
        "if not cache_hit:",
        "if True:",
        f"{WARM_UP} -k compiles_once",
    ),
    "a gather by FBGEMM without its weights": Mutation(
        "perf/measure/fbgemm.py",
        "weights.flatten().float()",
        "torch.ones_like(weights).flatten().float()",
        "tests/perf/check/test_parts.py -k fbgemm_gathers",
    ),
    "the share of the copy from milliseconds": Mutation(
        "perf/report/plot_bandwidth.py",
        "return row.moved_bytes / (row.graph_ms / 1e3) / row.copy_bytes_per_s",
        "return row.moved_bytes / row.median_ms / 1e-3 / row.copy_bytes_per_s",
        "tests/perf/report/test_report.py -k kernels_alone",
    ),
    "moments of a step in the table's dtype": Mutation(
        "perf/op/shapes.py",
        "rows + 2 * rows + 16 * rows // s",
        "rows + 2 * rows + 4 * rows",
        "tests/perf/op/test_op.py -k bytes_are",
    ),
}
