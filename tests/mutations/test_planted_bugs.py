"""Bugs planted in a copy of the repository, one at a time: the tests named beside each must fail.

The records stand beside this file. All of them take hours, and run when asked for
(`pytest -m mutations tests/mutations`). A few always do, and that all still apply is always seen.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ["pkm_triton", "kernels", "reference", "perf", "tests", "pyproject.toml"]
INSTALLED_INSIDE = ["kernels", "reference", "perf"]
RECORDS = [
    "harness",
    "layers",
    "lookups",
    "ops",
    "optim",
    "saving",
    "selection",
    "sharding",
    "studies",
]


def records(name):
    """The bugs of a file of records, each with the tests it names as a list."""
    bugs = importlib.import_module(f"mutations.{name}").MUTATIONS
    named = bugs.items() if isinstance(bugs, dict) else enumerate(bugs)
    for key, (file, right, wrong, tests) in named:
        yield f"{name}: {key}", (file, right, wrong, [tests] if isinstance(tests, str) else tests)


BUGS = {key: bug for name in RECORDS for key, bug in records(name)}
RUNS = sorted({run for *_, tests in BUGS.values() for run in tests})
# Bugs whose tests take seconds.
SAMPLE = [
    "lookups: 8",
    "ops: a gate of the sum, not of the token",
    "optim: 2",
    "selection: 8",
]
# Far beyond what any of the tests takes; a bug may have a loop never end.
SECONDS = 900

when_asked = [
    pytest.mark.mutations,
    pytest.mark.slow,
    pytest.mark.skipif(
        "'mutations' not in config.option.markexpr", reason="takes hours: pytest -m mutations"
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository in which the package is laid out as it is installed."""
    folder = tmp_path_factory.mktemp("planted")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    for name in INSTALLED_INSIDE:
        (folder / "pkm_triton" / name).symlink_to(folder / name)
    return folder


def outcome(copy, run):
    """pytest's exit code for a run of tests in the copy, and what it printed."""
    # Found before an installed package. A bug that reads past the end must not meet a GPU.
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # Several processes, as CI has the suite itself, would end with another exit code.
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*command, *shlex.split(run)],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def assert_caught(copy, bug):
    file, right, wrong, runs = bug
    source = (copy / file).read_text()
    (copy / file).write_text(source.replace(right, wrong))
    try:
        for run in runs:
            code, output = outcome(copy, run)
            # All else than that tests failed or passed says nothing of the bug.
            assert code == 0 or (code == 1 and " failed" in output), output
            if code == 1:
                return
    finally:
        (copy / file).write_text(source)
    pytest.fail(f"{wrong!r} for {right!r} in {file} passes {runs}")


@pytest.mark.parametrize("name", BUGS)
def test_applies(name):
    file, right, wrong, runs = BUGS[name]
    assert right != wrong
    assert right in (ROOT / file).read_text(), file
    assert runs
    for run in runs:
        assert (ROOT / shlex.split(run)[0]).exists(), run


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_is_caught(copy, name):
    code, output = outcome(copy, BUGS[name][3][0])
    assert code == 0, output
    assert_caught(copy, BUGS[name])


class TestWhenAsked:
    pytestmark = when_asked

    @pytest.mark.parametrize("run", RUNS)
    def test_passes_without_a_bug(self, copy, run):
        code, output = outcome(copy, run)
        assert code == 0, output

    @pytest.mark.parametrize("name", [name for name in BUGS if name not in SAMPLE])
    def test_is_caught(self, copy, name):
        assert_caught(copy, BUGS[name])
