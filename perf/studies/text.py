"""Text to train on: any file or folder, or what installed packages carry; split without a leak."""

import gzip
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TEST_SHARE = 1 / 32
"""Share of the documents that is kept for testing."""


@dataclass(frozen=True)
class Text:
    """Documents, and where they are from.

    Attributes:
        name: of the source; for a file or folder its last component.
        documents: each once, none empty, in the order of the source.
        size: bytes of all documents.
        sha256: of all documents, their lengths included.
    """

    name: str
    documents: list[bytes]
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, documents: Iterable[bytes]) -> "Text":
        """A text of these documents, without the empty and the repeated ones.

        Raises:
            ValueError: nothing is left.
        """
        kept = list(dict.fromkeys(each for each in documents if each.strip()))
        if not kept:
            raise ValueError(f"text: {name!r} holds no text")
        digest = hashlib.sha256()
        for document in kept:
            digest.update(len(document).to_bytes(8, "little") + document)
        return cls(name, kept, sum(map(len, kept)), digest.hexdigest())

    def split(self, test_share: float = TEST_SHARE) -> tuple[list[bytes], list[bytes]]:
        """Documents for training and for testing, by their hash alone.

        A document goes the same way wherever it stands and whatever else there is, so none is
        ever on both sides; white space does not count.

        Raises:
            ValueError: one side is empty.
        """
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        for document in self.documents:
            digest = hashlib.sha256(b" ".join(document.split())).digest()
            sides[int.from_bytes(digest[:8], "little") < test_share * 2**64].append(document)
        for side, documents in zip(("training", "testing"), sides, strict=True):
            if not documents:
                raise ValueError(
                    f"text: {self.name!r} has {len(self.documents)} documents, too few to split: "
                    f"none is left for {side} (a file is taken apart at blank lines, a folder at "
                    "its files)"
                )
        return sides


def read_text(source: str | None = None) -> Text:
    """Read a text.

    Args:
        source: a name in `SOURCES`, or the path of a file or a folder. A file is taken apart at
            blank lines, a folder at its files, of which binary ones are left out. By default the
            first source that is installed.

    Raises:
        ValueError: there is no such source, it is not installed, empty, or not text.
    """
    if source is None:
        source = next(name for name, read in SOURCES.items() if read() is not None)
    if source in SOURCES:
        documents = SOURCES[source]()
        if documents is None:
            raise ValueError(f"text: {source!r} is not installed ({_INSTALL[source]})")
        return Text.of(source, documents)
    path = Path(source)
    try:
        if path.is_dir():
            files = (each for each in sorted(path.rglob("*")) if each.is_file())
            contents = (each.read_bytes() for each in files)
            return Text.of(path.resolve().name, (each for each in contents if not _binary(each)))
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"text: {source!r} is neither a file or folder nor one of {', '.join(SOURCES)}"
        ) from error
    except OSError as error:
        raise ValueError(f"text: {source!r} cannot be read ({error.strerror})") from error
    if _binary(content):
        raise ValueError(f"text: {source!r} is binary, not text (it holds a zero byte)")
    return Text.of(path.name, paragraphs(content))


def paragraphs(content: bytes) -> list[bytes]:
    """The parts of `content` that blank lines set apart, each with what follows it."""
    return [each for each in re.split(rb"(?<=\n)[ \t\r]*\n(?=\S)", content) if each]


def _binary(content: bytes) -> bool:
    return b"\0" in content


def _gcide() -> Iterator[bytes] | None:
    """Entries of the GNU dictionary of English, facts and definitions (Debian's dict-gcide)."""
    path = Path("/usr/share/dictd/gcide.dict.dz")
    if not path.exists():
        return None
    # An entry starts at the margin, after a blank line; its own paragraphs are indented.
    return (entry.rstrip() + b"\n\n" for entry in paragraphs(gzip.decompress(path.read_bytes())))


def _botocore() -> Iterator[bytes] | None:
    """The prose that describes the calls of AWS (PyPI's botocore)."""
    found = importlib.util.find_spec("botocore")
    if found is None or found.origin is None:
        return None
    return _botocore_prose(Path(found.origin).parent / "data")


def _botocore_prose(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("service-2.json*")):
        content = path.read_bytes()
        service = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
        for prose in _documentation(service):
            yield " ".join(re.sub(r"<[^>]*>", " ", prose).split()).encode() + b"\n\n"


def _documentation(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def _python() -> Iterator[bytes]:
    """Python's own sources, with the documentation in them; without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder).parts
        if not {"site-packages", "dist-packages", "test", "tests", "__pycache__"} & set(inner):
            content = path.read_bytes()
            if not _binary(content):
                yield content


SOURCES: dict[str, Callable[[], Iterator[bytes] | None]] = {
    "gcide": _gcide,
    "botocore": _botocore,
    "python": _python,
}
"""Texts of installed packages, the preferred first; None where one is not installed."""

_INSTALL = {"gcide": "apt-get install dict-gcide", "botocore": "pip install botocore"}
