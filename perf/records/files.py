"""Write files whole or not at all, into a folder that is known to take them."""

import os
import tempfile
from pathlib import Path


def ensure_writable(folder: Path, option: str = "output") -> None:
    """Create `folder` where it is missing and prove that a file can be written in it.

    Args:
        folder: where files will be written.
        option: of the command, that names it.

    Raises:
        ValueError: the folder cannot be made, is not a folder, or takes no file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: cannot write in {str(folder)!r} ({error.strerror}); "
            f"give a folder that can be written with --{option}"
        ) from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: a reader sees the old file or the new, never a part."""
    content = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
