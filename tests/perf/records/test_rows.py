import dataclasses
import errno
import math

import pandas as pd
import pytest

from pkm_triton.perf.records.points import Point
from pkm_triton.perf.records.sweep_row import COLUMNS, SCHEMA, Row, RowFile, read_rows


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


@pytest.mark.parametrize("field", ["top_k", "device_name", "pass_name", "threads", "dtype"])
def test_parameters_and_device_are_the_key(field):
    other = {"top_k": 5, "device_name": "b", "pass_name": "forward+backward"}
    other |= {"threads": 7, "dtype": "bfloat16"}
    assert a_row().key != a_row(**{field: other[field]}).key


def test_get_finds_a_point_of_that_device_only(tmp_path):
    file = RowFile(tmp_path / "rows.csv")
    file.add(a_row(device_name="A"))
    assert file.get(Point(), "A") is not None
    assert file.get(Point(), "B") is None
    assert file.get(Point(heads=2), "A") is None


def test_another_schema_version_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    RowFile(path).add(a_row(schema=SCHEMA + 1))
    with pytest.raises(ValueError, match=rf"schema version {SCHEMA + 1}.*version {SCHEMA}"):
        RowFile(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(ValueError, match="no file"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'schema'"):
        read_rows(path)
    pd.DataFrame([{"schema": SCHEMA, "tokens": 3}]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="other columns"):
        read_rows(path)
    RowFile(tmp_path / "good.csv").add(a_row())
    path.write_text((tmp_path / "good.csv").read_text().replace("forward", "forward,", 1))
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(path)
    with pytest.raises(ValueError, match="cannot be read"):
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
