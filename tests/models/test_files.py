"""Files of tensors: written whole or not at all, and read only as they were written."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from pkm_triton import _files
from pkm_triton._files import read_tensors, write_tensors


def content(**changes):
    torch.manual_seed(0)
    return {
        "format": "test",
        "version": 2,
        "step": 7,
        "state": {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.zeros(0, 2)},
        "optimisers": [{0: {"exp_avg": torch.ones(3, dtype=torch.bfloat16), "lr": 1e-3}}],
        "pair": (1.5, None, True, "word"),
        "turned": torch.randn(4, 6).t(),
        **changes,
    }


def read(path):
    return read_tensors(path, "test", 2)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_comes_back(tmp_path):
    write_tensors(tmp_path / "file", content())
    assert_same(read(tmp_path / "file"), content())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_changed_bit_is_found_wherever_it_is(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    write_tensors(path, content())
    data = path.read_bytes()
    messages = []
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        other.write_bytes(flipped)
        try:
            loaded = read(other)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert_same(loaded, content())  # a bit that says nothing, of padding for example
    assert len(messages) > 100
    assert all(str(other) in message for message in messages)


def test_a_file_cut_short_is_found(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    write_tensors(path, content())
    data = path.read_bytes()
    for end in range(0, len(data) - 1, 97):
        other.write_bytes(data[:end])
        with pytest.raises(ValueError, match="other' is no file of test, or broken"):
            read(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state"]["a"].add_(1), "the tensor 'state/a' differs from its checksum"),
        (lambda c: c["optimisers"][0][0]["exp_avg"].zero_(), "tensor 'optimisers/0/0/exp_avg'"),
        (lambda c: c.update(step=8), "its plain data differs from its checksum"),
        (lambda c: c["state"].pop("b"), "it has not one checksum for each tensor"),
        (lambda c: c.pop("checksums"), "it has not one checksum for each tensor"),
        (lambda c: c["state"].update(a=c["state"]["a"].to_sparse()), "'state/a' differs"),
    ],
)
def test_what_differs_is_named(change, message, tmp_path):
    write_tensors(tmp_path / "file", content())
    changed = torch.load(tmp_path / "file")
    change(changed)
    torch.save(changed, tmp_path / "file")
    with pytest.raises(ValueError, match=f"file' is broken: .*{message}"):
        read(tmp_path / "file")


def test_a_tensor_larger_than_the_file_is_not_made(tmp_path):
    write_tensors(tmp_path / "file", content())
    changed = torch.load(tmp_path / "file")
    changed["state"]["a"] = torch.zeros(1).expand(2**20, 2**20)  # 4 TB, were it laid out
    torch.save(changed, tmp_path / "file")
    with pytest.raises(ValueError, match="file' is broken"):
        read(tmp_path / "file")


def test_nothing_in_a_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(content(trap=Trap()), tmp_path / "file")
    with pytest.raises(ValueError, match="file' is no file of test, or broken"):
        read(tmp_path / "file")
    assert not (tmp_path / "sprung").exists()


def test_older_files_without_checksums(tmp_path):
    torch.save(content(version=1), tmp_path / "file")
    assert_same(read_tensors(tmp_path / "file", "test", 2, plain=1), content(version=1))
    with pytest.raises(ValueError, match="has version 1, but this reads version 2"):
        read(tmp_path / "file")


def test_what_is_no_regular_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "pipe", OSError)):
        for use in (read, lambda path: write_tensors(path, content())):
            with pytest.raises(error, match=f"path is '{path}', but must be"):
                use(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "new", content())
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o640)
        write_tensors(tmp_path / "old", content())
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_followed(there, tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    if there:
        write_tensors(target, content(step=1))
    link.symlink_to(target)
    write_tensors(link, content())
    assert link.is_symlink()
    assert read(target)["step"] == 7


def test_an_old_file_is_replaced_and_not_written_into(tmp_path):
    path, second_name = tmp_path / "file", tmp_path / "second name"
    write_tensors(path, content(step=1))
    os.link(path, second_name)
    write_tensors(path, content())
    assert (read(path)["step"], read(second_name)["step"]) == (7, 1)


WRITE_FOR_EVER = """
import sys, time, torch
from pathlib import Path
from pkm_triton import _files
torch.save = lambda content, file: (file.write(b"half"), file.flush(), print("writing"),
                                    sys.stdout.flush(), time.sleep(60))
_files.write_tensors(Path(sys.argv[1]), {})
"""


def test_a_killed_write_leaves_the_old_file_and_its_rest_goes_with_the_next(tmp_path):
    path = tmp_path / "fi[l]e"
    write_tensors(path, content(step=1))
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    dead, alive = writers
    dead.send_signal(signal.SIGKILL)
    dead.communicate()
    assert read(path)["step"] == 1
    assert len(list(tmp_path.iterdir())) == 3
    write_tensors(path, content(step=2))
    left = [p for p in tmp_path.iterdir() if p != path]
    assert len(left) == 1  # of the one that lives
    assert read(path)["step"] == 2
    alive.kill()
    alive.communicate()
    write_tensors(path, content())
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files.torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "file", content())
    assert list(tmp_path.iterdir()) == []
