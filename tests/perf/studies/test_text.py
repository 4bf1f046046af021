import gzip
import json
from pathlib import Path

import pytest

from pkm_triton.perf.studies import text as text_module
from pkm_triton.perf.studies.text import SOURCES, Text, paragraphs, read_text


def test_a_file_is_taken_apart_at_blank_lines_and_nothing_is_lost(tmp_path):
    content = b"One.\nStill one.\n\nTwo.\n  \nThree,\n\n  indented goes on\n\n\nFour."
    (tmp_path / "a.txt").write_bytes(content)
    text = read_text(str(tmp_path / "a.txt"))
    assert text.name == "a.txt"
    assert text.documents == [
        b"One.\nStill one.\n",
        b"Two.\n",
        b"Three,\n\n  indented goes on\n\n",
        b"Four.",
    ]
    assert b"".join(text.documents).split() == content.split()


def test_a_folder_is_taken_apart_at_its_files_without_binary_ones(tmp_path):
    for name, content in (("b.txt", b"B"), ("sub/a.md", b"A"), ("c.bin", b"\0\1"), ("d", b" \n")):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    text = read_text(str(tmp_path / "folder"))
    assert text.name == "folder"
    assert text.documents == [b"B", b"A"]
    assert text.size == 2


def test_the_hash_tells_texts_apart_and_repeats_count_once():
    text = Text.of("a", [b"one", b"two", b"one"])
    assert text.documents == [b"one", b"two"]
    assert Text.of("b", [b"one", b"two"]).sha256 == text.sha256
    others = ([b"onet", b"wo"], [b"two", b"one"], [b"one"])
    assert len({text.sha256, *(Text.of("a", each).sha256 for each in others)}) == 4


def test_no_document_is_on_both_sides_wherever_it_stands():
    documents = [b"document %d " % number for number in range(4000)]
    train, test = Text.of("a", documents).split()
    assert sorted(train + test) == sorted(documents)
    assert not set(train) & set(test)
    assert len(test) == pytest.approx(4000 / 32, rel=0.3)
    # The same documents in another text, order and layout fall on the same sides.
    moved = [b"  " + document.replace(b" ", b"\n") for document in reversed(documents[:500])]
    other_train, other_test = Text.of("b", [*moved, b"more"]).split()
    words = [{b" ".join(each.split()) for each in side} for side in (train, test)]
    assert not {b" ".join(each.split()) for each in other_train} & words[1]
    assert not {b" ".join(each.split()) for each in other_test} & words[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\n \n", "holds no text"),
        (b"abc\0def", "is binary, not text"),
    ],
)
def test_what_is_no_text_is_refused(content, message, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(str(tmp_path / "a"))


def test_a_folder_of_nothing_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        read_text(str(tmp_path))
    with pytest.raises(ValueError, match="neither a file or folder nor one of gcide, botocore"):
        read_text(str(tmp_path / "nothing"))


def test_too_few_documents_to_split():
    with pytest.raises(ValueError, match="has 1 documents, too few to split"):
        Text.of("a", [b"only one"]).split()


def test_pythons_own_sources_are_always_there(monkeypatch):
    monkeypatch.setitem(SOURCES, "gcide", lambda: None)
    monkeypatch.setitem(SOURCES, "botocore", lambda: None)
    text = read_text()
    assert text.name == "python"
    assert text.size > 1_000_000
    assert any(b"class ArgumentParser" in document for document in text.documents)


def test_a_source_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setitem(SOURCES, "gcide", lambda: None)
    with pytest.raises(
        ValueError, match=r"'gcide' is not installed \(apt-get install dict-gcide\)"
    ):
        read_text("gcide")


def test_botocores_prose_without_its_markup(tmp_path):
    service = {"shapes": {"A": {"documentation": "<p>Lists <code>all</code>\n buckets.</p>"},
                          "B": [{"documentation": "Ends."}]}}  # fmt: skip
    folder = tmp_path / "data" / "s3" / "2006"
    folder.mkdir(parents=True)
    (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(service).encode()))
    (folder / "waiters-2.json").write_text("{}")
    prose = list(text_module._botocore_prose(tmp_path / "data"))
    assert prose == [b"Lists all buckets.\n\n", b"Ends.\n\n"]


@pytest.mark.skipif(
    not Path("/usr/share/dictd/gcide.dict.dz").exists(), reason="dict-gcide is not installed"
)
def test_the_dictionary_is_entries():
    text = read_text("gcide")
    assert len(text.documents) > 100_000
    assert sum(document.startswith(b"Lark \\Lark\\") for document in text.documents) >= 2


def test_paragraphs_of_windows_files():
    assert paragraphs(b"a\r\n\r\nb\r\n") == [b"a\r\n", b"b\r\n"]
