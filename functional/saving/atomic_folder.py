"""A folder that is whole or not there, also if the process is killed while it is written."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from ...specs.errors import PlanError, Problem
from ..checkpoints.formats.hugging_face import INDEX
from ..checkpoints.formats.manifest import NAME, read_manifest

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
    if Path.cwd().is_relative_to(folder):
        cause = "it is the folder in which this process runs, or holds that, and would be exchanged for another"
        raise PlanError([Problem(str(folder), cause, 'Save to a folder in it: "last"')])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if _is_ours(folder):
        _check_exchange(folder)
    partial = partial_of(folder)
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
    partial = partial_of(folder)
    is_there = _is_ours(folder)
    if is_there:
        _carry_over(folder, partial)
    _sync(partial)
    if is_there:
        _exchange(partial, folder)
    else:
        partial.rename(folder)
    _sync_folder(folder.parent)
    _remove(partial)


def abandon(folder: Path) -> None:
    """Remove what was written."""
    _remove(partial_of(absolute(folder)))


def absolute(folder: Path) -> Path:
    """Return the path of a folder from the root; a link stays one."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  resolve would follow links


def partial_of(folder: Path) -> Path:
    """Return where a folder is written before it is whole."""
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
    if folder.is_symlink():
        raise PlanError(
            [Problem(str(folder), f"it is a link to {folder.readlink()}", "Save under another name, or to what it leads to")]
        )
    if folder.exists() and not folder.is_dir():
        raise PlanError([Problem(str(folder), "it is there, and is no folder", "Save under another name")])
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if (folder / NAME).exists():
        try:
            return read_manifest(str(folder)) is not None
        except PlanError:
            pass  # a manifest of something else
    some = ", ".join(sorted(file.name for file in folder.iterdir())[:3])
    cause = f"it is there with other things in it ({some}), which nobody wrote here: it has no {NAME} of ours"
    raise PlanError([Problem(str(folder), cause, "Save under another name")])


def _carry_over(folder: Path, partial: Path) -> None:
    """Copy what somebody has put beside what was saved, such as a tokenizer, to what takes its place."""
    manifest = read_manifest(str(folder))
    saved = {NAME, INDEX, *(manifest.files if manifest else ())}
    for path in folder.iterdir():
        if path.name in saved or (partial / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        else:
            shutil.copy2(path, partial / path.name, follow_symlinks=False)


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
        if path.is_symlink():
            continue
        if path.is_dir():
            _sync(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
