"""Planted bugs of the studies' trainings, and of the reads recorded from them."""

TRAINING = "tests/perf/studies/test_training.py"
RUNNER = "tests/perf/studies/test_runner.py"
RANKS = "tests/perf/studies/test_ranks.py"
POPULARITY = "tests/perf/studies/test_popularity.py"
READS = "tests/perf/measure/test_reads_and_roofline.py"
STUDIES = "tests/perf/studies/test_studies.py"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    # Trials of other keys and another softmax.
    (
        "perf/studies/models.py",
        ".requires_grad_(not trial.fixed_keys)",
        ".requires_grad_(True)",
        [TRAINING],
    ),
    (
        "perf/studies/models.py",
        "scores.flatten(-2).softmax(-1)",
        "scores.softmax(-1).flatten(-2)",
        [TRAINING],
    ),
    ("perf/studies/trial.py", 'self.softmax == "all" and self.keys', "self.keys", [TRAINING]),
    # A longer trial goes on from a shorter one.
    (
        "perf/studies/runner.py",
        "dataclasses.replace(trial.before_tuning(), steps=1)",
        "trial",
        [RUNNER],
    ),
    ("perf/studies/runner.py", "todo[number:])", "todo[number + 1 :])", [RUNNER]),
    ("perf/studies/runner.py", "            if not goes_on:\n", "            if True:\n", [RUNNER]),
    (
        "perf/studies/runner.py",
        "            if not goes_on:\n",
        "            if False:\n",
        [RUNNER],
    ),
    # Several ranks.
    (
        "perf/measure/ranks.py",
        "            average_gradients(model.parameters())",
        "            pass",
        [RANKS],
    ),
    (
        "pkm_triton/distributed/data_parallel.py",
        "        grad /= distributed.get_world_size(group)",
        "        pass",
        [RANKS],
    ),
    # Reads as uneven as a trained memory's.
    ("perf/studies/popularity.py", "descending=True", "descending=False", [POPULARITY]),
    ("perf/studies/popularity.py", "most_first[end - 1]", "most_first[end % slots]", [POPULARITY]),
    ("perf/measure/reads.py", "by_rank[ranks.clamp_(max=num_slots - 1)]", "ranks", [READS]),
    (
        "perf/measure/reads.py",
        "parts[right - 1], parts[right]",
        "parts[right], parts[right]",
        [READS],
    ),
    ("perf/measure/reads.py", "[(0.0, 0.0), *rows]", "rows", [READS]),
    ("perf/measure/reads.py", "cumulative = (1 / ", "cumulative = (1 + 0 * ", [READS]),
    ("perf/studies/tuning.py", "    model.train(training)\n", "", [POPULARITY]),
    # Figures and tables of the curves.
    ("perf/studies/curves.py", "if trial.num_subkeys == smallest", "if False", [STUDIES]),
    ("perf/studies/curves.py", "others[row.seed] - 1", "others[min(others)] - 1", [STUDIES]),
    ("perf/studies/curves.py", "if row.seed in others]", "if others]", [STUDIES]),
    ("perf/studies/curves.py", "rows.sort(key=lambda row: row.seed)", "pass", [STUDIES]),
    # Gradients of sharded tables.
    (
        "pkm_triton/distributed/data_parallel.py",
        "    if ours <= theirs:\n        return True\n",
        "",
        ["tests/distributed/test_sharded.py -k compiled"],
    ),
    (
        "pkm_triton/distributed/data_parallel.py",
        "whole.shard = _mean(grad, local(parameter), group)",
        "whole.shard = grad",
        ["tests/distributed/test_sharded.py -k compiled"],
    ),
    (
        "pkm_triton/distributed/collectives.py",
        "return sent.div_(len(columns)), None",
        "return sent, None",
        ["tests/distributed/test_sharded.py -k 'compiled or two'"],
    ),
    (
        "pkm_triton/distributed/collectives.py",
        "parts.sum(0) * ranks",
        "parts.sum(0)",
        ["tests/distributed/test_sharded.py -k two"],
    ),
    (
        "pkm_triton/distributed/collectives.py",
        "all_ if owned is None else all_.masked_fill_(~owned, 0)",
        "all_",
        ["tests/distributed/test_sharded.py -k two"],
    ),
    (
        "pkm_triton/distributed/sharding.py",
        "generator.manual_seed(first_seed + start)",
        "generator.manual_seed(first_seed + start - low)",
        ["tests/distributed/test_sharded.py -k compiled"],
    ),
    (
        "pkm_triton/sharded_gradient.py",
        "            norms = torch.cat(parts)",
        "            norms = parts[0]",
        ["tests/distributed/test_sharded.py -k two"],
    ),
]
