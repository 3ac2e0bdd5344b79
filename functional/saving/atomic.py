"""Files and folders that are whole or not there, also if the process is killed while it writes them."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ...specs.errors import PlanError, Problem
from ..checkpoints.formats.hugging_face import INDEX
from ..checkpoints.formats.manifest import NAME, read_manifest

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_whole(file: Path, text: str) -> None:
    """Write a text file that nobody ever sees half written.

    Raises:
        OSError: If its folder is missing, or not writable.
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


def begin_folder(folder: Path) -> Path:
    """Make ``.name.partial`` beside ``folder`` to write to; ``finish_folder`` moves it to ``folder``.

    Args:
        folder: The folder that will appear; now missing, empty, or with a manifest of ours.

    Raises:
        PlanError: If anything else is there, or the system cannot exchange folders atomically.
        OSError: If the partial folder cannot be made.
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


def finish_folder(folder: Path) -> None:
    """Sync the partial folder to disk, move it to ``folder`` atomically, and remove the folder that was there before.

    An existing folder is exchanged with the new folder by ``renameat2`` with ``RENAME_EXCHANGE`` (Linux).

    Raises:
        PlanError: If something else has appeared at ``folder`` meanwhile.
        OSError: If the system refuses; then nothing has changed.
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


def abandon_folder(folder: Path) -> None:
    """Remove the partial folder."""
    _remove(partial_of(absolute(folder)))


def absolute(folder: Path) -> Path:
    """Return the absolute path of a folder; links are not followed."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  resolve would follow links


def partial_of(folder: Path) -> Path:
    """Return the partial folder beside a folder."""
    return folder.with_name(f".{folder.name}.partial")


def _umask() -> int:
    """Return the mode bits that new files of this process do not get; the system only tells when they are set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(partial: Path) -> None:
    """Remove a folder, its manifest first: if that is interrupted, the remains do not pass for a saved folder."""
    with suppress(OSError):
        (partial / NAME).unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Tell whether a folder was saved by ``save_checkpoint``; False if it is missing or empty.

    Raises:
        PlanError: If anything else is there.
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
    """Copy files that somebody put beside the saved files, such as a tokenizer, to the new folder."""
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
    """Raise PlanError if the file system of a folder cannot exchange folders."""
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
    """Exchange two folders atomically."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(0, "there is no renameat2")
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _sync(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
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
