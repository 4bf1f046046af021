import os
import stat

import pytest

from pkm_triton.perf.records.files import ensure_writable, write_whole


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path):
    path = tmp_path / "a"
    write_whole(path, "old")
    with open(path) as reader:
        write_whole(path, "new content")
        assert reader.read() == "old"
    assert path.read_text() == "new content"
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_rules_a_new_file_and_an_old_one_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        write_whole(path, b"x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_whole(path, b"y")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a'"):
        write_whole(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"json: cannot write in .*--json"):
        ensure_writable(tmp_path / "file", "json")
