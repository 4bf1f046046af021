"""Write files whole or not at all, into a folder that is known to take them."""

import os
import stat
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
    """Replace `path` by `data` in one step: a reader sees the old file or the new, never a part.

    A new file gets the mode that the umask leaves, an old one keeps its own; a symbolic link goes
    on pointing to the file.
    """
    content = data.encode() if isinstance(data, str) else data
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        raise
