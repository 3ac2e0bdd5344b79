"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it, also if the process ends meanwhile.

    Raises:
        OSError: If the folder is not there, or cannot be written to.
    """
    number, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    beside = Path(name)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as handle:
            handle.write(text)
        beside.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o666 & ~_umask())
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Return the mode bits that new files of this process do not get; there is no way to ask but to set them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
