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
        "        if reading.form is True:\n            run.gather_values_backward_sparse",
        "        if False:\n            run.gather_values_backward_sparse",
        f"{WARM_UP} -k training_step",
    ),
    "slots that train planned in their table's dtype": Mutation(
        "pkm_triton/compiling.py",
        "reading(tuned.values, False, wide)",
        "reading(tuned.values, False, values.dtype)",
        f"{WARM_UP} -k beside_the_others",
    ),
    "a rank's part planned for its own tokens": Mutation(
        "pkm_triton/compiling.py",
        "tokens *= layer.sharding.ranks",
        "tokens *= 1",
        f"{WARM_UP} -k tokens_of_all_ranks",
    ),
    "a baseline compiled with what the ones before it left": Mutation(
        "perf/sweep/run.py",
        "        torch.compiler.reset()\n",
        "        pass\n",
        "tests/perf/sweep/test_run.py -k compiled_for_its_sizes",
    ),
    "launches hidden behind the clearing of a cache": Mutation(
        "perf/measure/timing.py",
        "if not each.queued:",
        "if each.queued:",
        "tests/perf/measure/test_cuda_timer.py -k idle_gpu",
    ),
    "a table of ranks that no stream waits for": Mutation(
        "kernels/combine/plan.py",
        "made.synchronize()",
        "made.record()",
        "tests/kernels/test_rank_pairs.py -k every_stream",
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
        "every + 2 * every + 16 * every // s",
        "every + 2 * every + 4 * every",
        "tests/perf/op/test_op.py -k bytes_are",
    ),
}
