"""A folder that is whole or not there, also if the process is killed while it is written."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ...specs.errors import PlanError, Problem
from .manifest_check import NAME

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def begin(folder: Path) -> Path:
    """Return a folder to write to, ``.name.partial`` beside ``folder``, which takes its place when ``finish`` is called.

    Args:
        folder: Where the folder will be: nothing, an empty folder, or one with a manifest.

    Raises:
        PlanError: If something else is there, or the system cannot exchange folders at once.
        OSError: If it cannot be written.
    """
    folder = absolute(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _is_ours(folder):
        _check_exchange(folder)
    partial = _partial(folder)
    _remove(partial)  # of a process that was killed
    partial.mkdir()
    return partial


def finish(folder: Path) -> None:
    """Let what was written take the place of ``folder``, at once, when all of it is on the disk; remove what was there.

    A folder that is there is exchanged with the new one by ``renameat2`` with ``RENAME_EXCHANGE`` (Linux).

    Raises:
        PlanError: If something else has come there meanwhile.
        OSError: If it cannot be done; then nothing has changed.
    """
    folder = absolute(folder)
    partial = _partial(folder)
    _sync(partial)
    if _is_ours(folder):
        _exchange(partial, folder)
    else:
        partial.rename(folder)
    _sync_folder(folder.parent)
    _remove(partial)


def abandon(folder: Path) -> None:
    """Remove what was written."""
    _remove(_partial(absolute(folder)))


def absolute(folder: Path) -> Path:
    """Return the path of a folder from the root; a link stays one."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  resolve would follow links


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _remove(partial: Path) -> None:
    """Remove a folder; what is left of it if that is stopped has no manifest."""
    with suppress(OSError):
        (partial / NAME).unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder that was saved here is there; False for nothing, and for an empty folder.

    Raises:
        PlanError: If something else is there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise PlanError([Problem(str(folder), "it is there, and is no folder", "Save under another name")])
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / NAME).exists():
        some = ", ".join(sorted(file.name for file in folder.iterdir())[:3])
        cause = f"it is there with other things in it ({some}), which nobody wrote here: it has no {NAME}"
        raise PlanError([Problem(str(folder), cause, "Save under another name")])
    return True


def _check_exchange(folder: Path) -> None:
    """Raise PlanError if the system cannot exchange folders where this one is."""
    first, second = folder.with_name(f".{folder.name}.a"), folder.with_name(f".{folder.name}.b")
    first.mkdir(exist_ok=True)
    second.mkdir(exist_ok=True)
    try:
        _exchange(first, second)
    except OSError as error:
        cause = f"it is there, and this system cannot exchange folders at once: {error}"
        raise PlanError([Problem(str(folder), cause, "Save under another name, and remove the old one then")]) from None
    finally:
        first.rmdir()
        second.rmdir()


def _exchange(first: Path, second: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(0, "there is no renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _sync(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
