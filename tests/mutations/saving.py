"""Planted bugs of what wraps, saves, loads and trains models that lie over ranks.

Each is a file, a text in it, what stands there instead, and the tests of which one must fail.
"""

FOLDERS = "tests/distributed/test_checkpoints.py -k killed"
LARGE = "tests/distributed/test_checkpoints.py -k whole_table"
FILE = "tests/distributed/test_one_file.py -k one_process"
WRAPPED = "tests/distributed/test_sharded.py -k wrapped"
MEMORY = "tests/layers/test_memory.py -k another_dtype"
SHARD = "tests/perf/studies/test_shard.py -k one_rank"
HANGS = "tests/perf/studies/test_shard.py -k hangs"
WRONG = "tests/distributed/test_one_file.py -k wrong"

MUTATIONS: list[tuple[str, str, str, list[str]]] = [
    (
        "pkm_triton/distributed/checkpoint_folders.py",
        "max(filter(_is_complete, _numbered(folder))",
        "max(_numbered(folder)",
        [FOLDERS],
    ),
    (
        "pkm_triton/distributed/checkpoint_folders.py",
        "if old != newest:",
        "if True:",
        [FOLDERS],
    ),
    ("pkm_triton/_row_states.py", "items() if name not in states}", "items()}", [LARGE]),
    (
        "pkm_triton/_row_optimizer.py",
        "                if param.requires_grad:\n                    self._state_of(param, group)",
        "                pass",
        [LARGE],
    ),
    (
        "pkm_triton/distributed/one_file.py",
        "target[start:stop], found)",
        "target[start:stop])",
        [FILE],
    ),
    (
        "pkm_triton/distributed/one_file.py",
        "slice(at, at + size) for at, size in ranges",
        "slice(0, size) for at, size in ranges",
        [FILE],
    ),
    (
        "pkm_triton/distributed/one_file.py",
        "None if chunk in chunks else chunk",
        "chunk",
        [FILE],
    ),
    ("pkm_triton/checkpoints.py", "fill(part, state[key])", "pass", [FILE]),
    ("pkm_triton/_files.py", "order[rank::ranks]", "order[2 + rank :: ranks]", [WRONG]),
    (
        "pkm_triton/distributed/agreement.py",
        "ValueError, TypeError, OSError)",
        "ValueError)",
        [WRONG],
    ),
    # Wrapping.
    ("pkm_triton/distributed/fsdp.py", "values | set(", "set(", [WRAPPED]),
    ("pkm_triton/memory.py", "self._read(*reads).to(dtype)", "self._read(*reads)", [MEMORY]),
    # Trainings.
    (
        "perf/measure/ranks.py",
        "        memory.reset_parameters()",
        "        memory.training",
        [SHARD],
    ),
    ("perf/measure/ranks.py", "if not store.check([", "if store.check([", [HANGS]),
    ("perf/studies/training.py", "self.ranks.mean(own).to(own.dtype)", "own", [SHARD]),
]
