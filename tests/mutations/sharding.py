"""Bugs in what ranks send each other, in what is told of it beforehand, and in who may step."""

from mutations.ops import Mutation

TRAFFIC = "tests/distributed/test_traffic.py"
PLAN = "tests/distributed/test_plan.py"
ANY_SIZE = "tests/distributed/test_any_size.py -k 2-"
SWEEP = "tests/perf/sweep/test_over_ranks.py -k together"

MUTATIONS = {
    "shards that round alike": Mutation(
        "pkm_triton/_row_optimizer.py",
        'if not hasattr(param, "placements"):',
        "if True:",
        "tests/distributed/test_sharded.py -k compiled_meta",
    ),
    "narrow weights told as wide": Mutation(
        "pkm_triton/distributed/collective_bytes.py",
        "weight_bytes = 2 if narrow_weights else",
        "weight_bytes = 4 if narrow_weights else",
        f"{TRAFFIC} -k columns",
    ),
    "what a rank keeps told as sent": Mutation(
        "pkm_triton/distributed/collective_bytes.py",
        "(of_receivers - receiver[r])",
        "of_receivers",
        f"{TRAFFIC} -k columns",
    ),
    "row ids of averaged gradients in 8 bytes": Mutation(
        "pkm_triton/distributed/gathering.py",
        "_gather(rows.to(torch.int32), counts, group)",
        "_gather(rows.to(torch.int64), counts, group)",
        f"{TRAFFIC} -k moved[2]",
    ),
    "weights of other ranks' rows used": Mutation(
        "pkm_triton/distributed/collectives.py",
        "return all_ if owned is None else all_.masked_fill_(~owned, 0)",
        "return all_",
        ANY_SIZE,
    ),
    "weights' gradients of ranks that lack the row": Mutation(
        "pkm_triton/distributed/collectives.py",
        "part.masked_fill_((slots < low) | (slots >= high), 0)",
        "pass",
        ANY_SIZE,
    ),
    "columns laid side by side as if by rows first": Mutation(
        "pkm_triton/distributed/layouts.py",
        'if layouts[0] == "columns":',
        "if False:",
        "tests/distributed/test_any_size.py -k 4-",
    ),
    "sums of all tokens held while they are added up": Mutation(
        "pkm_triton/distributed/collectives.py",
        "    del sums\n",
        "",
        "tests/distributed/test_sharded.py -k needs",
    ),
    "states of rows left out of a plan": Mutation(
        "pkm_triton/distributed/plan.py",
        "(width * kept[0] + kept[1])",
        "(width * kept[0])",
        f"{PLAN} -k states_of_rows",
    ),
    "columns planned however narrow": Mutation(
        "pkm_triton/distributed/plan.py",
        "line = min(LINE_BYTES, value_dim * itemsize)",
        "line = 1",
        f"{PLAN} -k best",
    ),
    "a plan that stops short of what fits": Mutation(
        "pkm_triton/distributed/plan.py",
        "(low, middle - 1)",
        "(low, middle - 2)",
        f"{PLAN} -k largest",
    ),
    "no look at who steps sharded values": Mutation(
        "pkm_triton/distributed/optimizers.py",
        "    register_optimizer_step_pre_hook(_check)",
        "    return",
        "tests/distributed/test_sharded.py -k wrong",
    ),
    "the speed of one rank for that of all": Mutation(
        "perf/measure/timing.py",
        "point.ranks * point.tokens / timing",
        "point.tokens / timing",
        SWEEP,
    ),
    "the backward pass's bytes told of a forward pass": Mutation(
        "perf/sweep/over_ranks.py",
        'told.sent(0, None if point.backward else "forward")',
        "told.sent(0)",
        SWEEP,
    ),
}
