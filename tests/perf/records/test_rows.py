import csv
import dataclasses
import errno
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pkm_triton.perf.records import row_file
from pkm_triton.perf.records.points import Point
from pkm_triton.perf.records.row_file import rows_to_csv
from pkm_triton.perf.records.sweep_row import COLUMNS, SCHEMA, Row, RowFile, read_rows
from pkm_triton.perf.studies.records import TimedRow, TrainedRow


def a_row(**changes):
    figures = {"median_ms": 0.1 + 0.2, "low_ms": 1e-7, "high_ms": 12345.678, "samples": 9}
    defaults = {"device_name": 'a "CPU", 2 cores', "commit": "1234567890", **figures}
    return Row(**{**defaults, **changes})


def same(a, b):
    """Equal field by field, NaN equal to NaN."""
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(x == y or (x != x and y != y) for x, y in pairs)


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        a_row(),
        a_row(top_k=8, sparse_grad=True, status="failed: ValueError: a, b and\na line"),
        a_row(heads=1, commit="1e10", torch_version="2.13"),
    ]
    RowFile(tmp_path / "rows.csv").add(*rows)
    found = read_rows(tmp_path / "rows.csv")
    assert len(found) == 3
    assert all(map(same, rows, found))
    assert type(found[1].sparse_grad) is bool
    assert math.isnan(found[0].gather_ms)


def test_the_header_is_the_fields_of_a_row(tmp_path):
    RowFile(tmp_path / "rows.csv").add(a_row())
    header = (tmp_path / "rows.csv").read_text().splitlines()[0]
    assert tuple(header.split(",")) == COLUMNS


def test_a_row_replaces_the_one_with_its_key(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    file.add(a_row(), a_row(top_k=8))
    file.add(a_row(median_ms=5.0, commit="other", torch_version="9"))
    assert [(row.top_k, row.median_ms) for row in read_rows(file.path)] == [
        (32, 5.0),
        (8, 0.1 + 0.2),
    ]


OTHERS = {"top_k": 5, "device_name": "b", "pass_name": "forward+backward", "threads": 7}
OTHERS |= {"dtype": "bfloat16", "seed": 1, "seconds": 0.5}


@pytest.mark.parametrize("field", OTHERS)
def test_all_that_was_asked_and_the_device_are_the_key(field):
    assert a_row().key != a_row(**{field: OTHERS[field]}).key


def test_get_finds_a_point_of_that_device_seed_and_time_only(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    file.add(a_row(device_name="A", seed=3, seconds=0.5))
    assert file.get(Point(), "A", 3, 0.5) is not None
    assert file.get(Point(), "B", 3, 0.5) is None
    assert file.get(Point(), "A", 4, 0.5) is None
    assert file.get(Point(), "A", 3, 0.6) is None
    assert file.get(Point(heads=2), "A", 3, 0.5) is None


def test_a_later_schema_version_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    RowFile(path).add(a_row(schema=SCHEMA + 1))
    with pytest.raises(ValueError, match=rf"schema version {SCHEMA + 1}.*up to {SCHEMA}"):
        RowFile(path)


RESULTS = Path(__file__).parents[3] / "perf" / "results"
KINDS = {"sweep.csv": Row, "trained.csv": TrainedRow, "timed.csv": TimedRow}
COMMITTED = sorted(RESULTS.rglob("*.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_files_are_read_whatever_their_schema(path, tmp_path):
    kind = KINDS[path.name]
    rows = row_file.read_rows(path, kind)
    lines = path.read_text().splitlines()
    assert len(rows) == len(lines) - 1
    assert len({row.key for row in rows}) == len(rows)
    header, first = next(csv.DictReader(lines)).keys(), next(csv.DictReader(lines))
    for name in header:
        if name != "schema":
            value = getattr(rows[0], name)
            assert first[name] == ("" if value != value else str(value)), name
    # A row added to it raises the whole file to today's schema and loses nothing.
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    new = dataclasses.replace(rows[0], seed=77)
    row_file.RowFile(copy, kind).add(new)
    assert all(map(same, row_file.read_rows(copy, kind), [*rows, new]))


def test_a_file_of_the_first_schema_is_known_by_what_it_lacks():
    (path,) = [path for path in COMMITTED if path.parent.name == "cpu-2-cores"]
    row = read_rows(path)[0]
    if "seed" not in path.read_text().splitlines()[0]:
        assert (row.seed, row.seconds, row.schema) == (0, 0.0, SCHEMA)
        assert math.isnan(row.cpu_ms)


def test_two_files_of_one_path_keep_each_others_rows(tmp_path):
    path = tmp_path / "rows.csv"
    one, other = RowFile(path), RowFile(path)
    one.add(a_row(top_k=1))
    other.add(a_row(top_k=2))
    one.add(a_row(top_k=3))
    other.add(a_row(top_k=1, median_ms=7.0))
    one.add(a_row(top_k=4))
    assert [row.top_k for row in read_rows(path)] == [1, 2, 3, 4]
    assert read_rows(path)[0].median_ms == 7.0
    assert [row.top_k for row in one.rows] == [1, 2, 3, 4]


ADDER = """
import sys
from pathlib import Path
from pkm_triton.perf.records.sweep_row import Row, RowFile
file = RowFile(Path(sys.argv[1]))
for top_k in range(1, 31):
    file.add(Row(heads=int(sys.argv[2]), top_k=top_k, median_ms=1.0, low_ms=1.0, high_ms=1.0))
    if top_k % 10 == 0:  # replaces, and so writes the file anew
        file.add(Row(heads=int(sys.argv[2]), top_k=1, median_ms=1.0, low_ms=1.0, high_ms=2.0))
"""


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-c", ADDER, str(path)]
    running = [subprocess.Popen([*command, str(heads)]) for heads in (1, 2)]
    assert [each.wait(timeout=60) for each in running] == [0, 0]
    rows = read_rows(path)
    assert {(row.heads, row.top_k) for row in rows} == {
        (heads, top_k) for heads in (1, 2) for top_k in range(1, 31)
    }
    assert len(rows) == 60
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_row_of_a_killed_process_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "rows.csv"
    RowFile(path).add(a_row(), a_row(top_k=8, status="failed: two\nlines"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    second = whole.index(b"\n", first) + 1
    for end in (second + 1, whole.index(b"two\n") + 4, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert [row.top_k for row in read_rows(path)] == [32], end
        file = RowFile(path)
        file.add(a_row(top_k=9))
        assert [row.top_k for row in read_rows(path)] == [32, 9], end


def test_adding_a_row_takes_no_longer_the_more_there_are(tmp_path):
    """Bytes written, which is what would grow, not seconds."""
    file = RowFile(tmp_path / "rows.csv")
    file.add(*(a_row(tokens=tokens) for tokens in range(1, 501)))
    inode, before = file.path.stat().st_ino, file.path.stat().st_size
    file.add(a_row(tokens=501))
    assert file.path.stat().st_ino == inode
    assert file.path.stat().st_size - before < 2 * before / 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"median_ms": -3.0}, "median_ms is -3.0"),
        ({"high_ms": math.inf}, "high_ms is inf"),
        ({"low_ms": math.nan}, "status is ok, but low_ms is nan; a time above 0"),
        ({"median_ms": 0.0, "low_ms": 0.0}, "status is ok, but median_ms is 0.0"),
        ({"low_ms": 9.0}, "median_ms 0.3.* is not between 9.0 and 12345.678"),
        ({"peak_bytes": -1.0}, "peak_bytes is -1.0"),
    ],
)
def test_figures_that_cannot_be_are_refused(changes, message, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(rows_to_csv([a_row(), a_row(top_k=8, **changes)], Row, header=True))
    with pytest.raises(ValueError, match=rf"rows.csv', record 3: {message}"):
        read_rows(path)
    with pytest.raises(AssertionError):
        RowFile(tmp_path / "new.csv").add(a_row(**changes))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(ValueError, match="no file"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no column 'schema'"):
        read_rows(path)
    path.write_bytes(b"\x89PNG\xff\n")
    with pytest.raises(ValueError, match="cannot be read: 'utf-8' codec"):
        read_rows(path)
    path.write_text("# Product-key memory\n\nOf, two, commas\n")
    with pytest.raises(ValueError, match="was not written by pkm-perf"):
        read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'schema'"):
        read_rows(path)
    path.write_text(f"schema,tokens\n{SCHEMA},3\n")
    with pytest.raises(ValueError, match="other columns"):
        read_rows(path)
    RowFile(tmp_path / "good.csv").add(a_row())
    path.write_text((tmp_path / "good.csv").read_text().replace("forward", "forward,", 1))
    with pytest.raises(
        ValueError, match=f"record 2: {len(COLUMNS) + 1} cells where the header has"
    ):
        read_rows(path)
    path.write_text((tmp_path / "good.csv").read_text().replace(",32,", ",many,", 1))
    with pytest.raises(ValueError, match=r"record 2: has a cell that cannot be read: .*'many'"):
        read_rows(path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_rows(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "rows.csv")
    file.add(a_row())
    before = file.path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        file.add(a_row(top_k=8))
    assert file.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file.path]
