"""Files of tensors: written whole or not at all, and read only as they were written."""

import contextlib
import ctypes
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

CHECKSUMS = "checksums"


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data and tensors as `torch.save` does: the whole file or nothing.

    An old file of that name stays until the new one is complete, and gives it its permissions; a
    new one has those of the umask. A symbolic link stays, and the file it names is written. What a
    killed process left of such a file goes when the file is next written.

    Args:
        path: the file; its folder must exist.
        content: names to plain data (numbers, strings, None, lists, tuples, dicts) and tensors.

    Raises:
        OSError: if the file cannot be written, or path is there and no regular file.
    """
    content = {**content, CHECKSUMS: [checksum(part) for _, part in parts_of(content)]}
    with replaced(path) as (file, _):
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the reason, which torch hides
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file to write, and its path, which takes the place of another once the block has ended.

    See `write_tensors`.
    """
    path = Path(os.path.realpath(path))
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(_regular(path).st_mode)
    _remove_leftovers(path)
    handle, temporary = _create(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            if fcntl is not None:  # while it is locked
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise


def read_tensors(
    path: Path,
    form: str,
    version: int,
    *,
    plain: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Read what `write_tensors` wrote, with "format" and "version" among it; runs nothing.

    Args:
        path: the file.
        form: what "format" must be.
        version: what "version" must be.
        plain: an older version to be read as well, whose files have no checksums.
        share: rank and number of those that read the same file, each of which compares some of the
            tensors with their checksums.

    Returns:
        The content, on the CPU; what is not looked at is not read.

    Raises:
        ValueError: if the file is damaged, or of another format or version.
        OSError: if the file cannot be read.
    """
    _regular(path)
    with path.open("rb"):
        pass  # a file that may not be read is said as such
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what torch raises for a damaged file is of any class
        raise ValueError(f"{str(path)!r} is no file of {form}, or broken: {error}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{str(path)!r} is no file of {form}")
    found = content.get("version")
    if found != version and (plain is None or found != plain):
        raise ValueError(f"{str(path)!r} has version {found!r}, but this reads version {version}")
    checksums = content.pop(CHECKSUMS, None)
    if found != plain:
        _check(path, content, checksums, *share)
    return content


def _check(path: Path, content: Mapping[str, Any], checksums: Any, rank: int, ranks: int) -> None:
    (_, outline), *tensors = parts_of(content)
    if isinstance(checksums, Tensor):
        checksums = checksums.tolist()
    if not isinstance(checksums, list) or len(checksums) != 1 + len(tensors):
        raise ValueError(f"{str(path)!r} is broken: it has not one checksum for each tensor")
    # Ranks get equally much to read, as far as tensors allow.
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index][1].numel())
    mine = [(*tensors[index], checksums[1 + index]) for index in order[rank::ranks]]
    for place, part, expected in [("", outline, checksums[0]), *mine]:
        try:
            same = checksum(part) == expected
        except (RuntimeError, NotImplementedError):  # no plain tensor
            same = False
        if not same:
            what = f"the tensor {place!r}" if isinstance(part, Tensor) else "its plain data"
            raise ValueError(f"{str(path)!r} is broken: {what} differs from its checksum")


def parts_of(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All that is no tensor, as one text, then every tensor, each with its place."""
    tensors: list[tuple[str, Tensor]] = []

    def outline(value: Any, place: str) -> str:
        if isinstance(value, Tensor):
            tensors.append((place, value))
            return f"tensor {value.dtype} {list(value.shape)}"
        if isinstance(value, Mapping):
            parts = (f"{key!r}: {outline(part, f'{place}/{key}')}" for key, part in value.items())
            return f"{{{', '.join(parts)}}}"
        if isinstance(value, (list, tuple)):
            parts = (outline(part, f"{place}/{index}") for index, part in enumerate(value))
            return f"{type(value).__name__}({', '.join(parts)})"
        return repr(sorted(value, key=repr) if isinstance(value, set) else value)

    text = outline({key: part for key, part in content.items() if key != CHECKSUMS}, "")
    yield "", text
    yield from ((place[1:], tensor) for place, tensor in tensors)


def checksum(part: Tensor | str, before: int = 0) -> int:
    """The checksum of a tensor or a text, or of one that `before` is the beginning of."""
    if isinstance(part, str):
        return zlib.crc32(part.encode(), before)
    size = part.numel() * part.element_size()
    if size > part.untyped_storage().nbytes():
        raise RuntimeError("a tensor must not be larger than its data")
    if size == 0:
        return before
    data = part.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32((ctypes.c_char * size).from_address(data.data_ptr()), before)


def _create(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, of the umask's permissions, locked as long as it is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            error.filename = str(path)  # the name that was asked for
            raise
        if fcntl is None:
            return handle, temporary
        with contextlib.suppress(OSError):  # where there are no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():  # not taken for a leftover before it was locked
            return handle, temporary
        os.close(handle)


def _regular(path: Path) -> os.stat_result:
    """What the file system says of a file.

    Raises:
        OSError: if it is not there, or no regular file.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"path is {str(path)!r}, but must be a file, not a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"path is {str(path)!r}, but must be a regular file")
    return status


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `path`: unlike a live one's, it is not locked."""
    if fcntl is None:
        return
    for other in path.parent.glob(f".{_literal(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), other.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink()


def _literal(name: str) -> str:
    """`name` as a pattern that matches itself alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
