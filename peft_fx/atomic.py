"""Files that are written whole or not at all, also by a process that is killed, and several of them as one.

What is new lies complete, and on the disk, in a folder of its own before one rename makes it count:

    a folder that is new     <parent>/.peft_fx-new-...  ->  <folder>
    a file                   <folder>/.peft_fx-new-.../<name>  ->  <folder>/<name>
    several files            <folder>/.peft_fx-new-...  ->  <folder>/.peft_fx-saved, whose files then move to their places

Readers ask `current` for a file: it may still be on its way. So they have all the old files or all the new ones at any moment.
What a killed process left is finished, or taken away, by the next one that writes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from uuid import uuid4

from .errors import AdapterFileError, PeftFxError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: writers of one folder have to take turns by themselves there
    fcntl = None

NEW, SAVED, FORMER = ".peft_fx-new-", ".peft_fx-saved", "former"
StrPath = str | os.PathLike[str]
Writers = Mapping[str, Callable[[Path], object]]


def write_files(folder: StrPath, writers: Writers) -> Path:
    """Writes files (name -> function that writes one at the path it gets) into a folder, made if need be. Others stay.

    Links in the folder are replaced, not written through; the folder itself may be one. Returns the folder. Raises
    AdapterFileError, and leaves everything as it was, where that cannot be: no space, no permission, a folder in the way.
    """
    try:
        real = Path(os.path.realpath(folder))
        home = real if real.is_dir() else real.parent
        with made(home), staged(home) as stage:
            for name, write in writers.items():
                write(stage / name)
                sync(stage / name)
            sync(stage)
            place(stage, real, tuple(writers))
    except PeftFxError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte, or one that cannot be encoded
        reason = getattr(error, "strerror", None) or error
        names = ", ".join(writers)
        raise AdapterFileError(f"{str(folder)!r}: {names} cannot be written, nothing has changed: {reason}") from error
    return Path(folder)


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder is: on its way still, or in its place. What somebody wrote there since comes first."""
    coming, there = folder / SAVED / name, folder / name
    with suppress(OSError):
        written = coming.stat().st_mtime_ns
        if not there.exists() or there.stat().st_mtime_ns <= written:
            return coming
    return there


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder and those that it is in; an error inside the block takes away what was made."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # somebody else uses it already
                path.rmdir()
        raise


@contextmanager
def staged(home: Path) -> Iterator[Path]:
    """A new folder in `home`, locked while it is in use: others without a lock are what killed processes left, and go."""
    with ExitStack() as kept:
        with locked(home):
            for left in home.glob(f"{NEW}*"):
                with locked(left, wait=False) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)
            stage = home / f"{NEW}{uuid4().hex}"
            stage.mkdir()
            kept.enter_context(locked(stage))
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """The folder's lock inside the block, which ends with the process too. False: somebody has it, or there are no locks."""
    descriptor, got = None, False
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
    try:
        yield got
    finally:
        if descriptor is not None:
            if got and fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do it where a child has the descriptor too
            os.close(descriptor)


def place(stage: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Makes the files in `stage` those of the folder."""
    if stage.parent != folder:
        with locked(stage.parent):  # or somebody else makes the folder meanwhile
            if not folder.exists():
                os.rename(stage, folder)
                sync(stage.parent)
                return
    with locked(folder):
        settle(folder)
        for name in names:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise IsADirectoryError(f"{name} is a folder there")
        if len(names) == 1:
            os.replace(stage / names[0], folder / names[0])
        else:
            (stage / FORMER).mkdir()
            for name in names:
                keep(folder / name, stage / FORMER / name)
                outdate(stage / name, folder / name)
            os.rename(stage, folder / SAVED)
            try:
                settle(folder)
            except OSError:
                restore(folder, names)
                raise
        sync(folder)


def settle(folder: Path) -> None:
    """Moves what was saved to its place, but for files that somebody has written there since."""
    saved = folder / SAVED
    if saved.is_symlink():  # of somebody who wants other files moved
        saved.unlink()
    for path in sorted(saved.iterdir()) if saved.is_dir() else ():
        if path.name != FORMER and current(folder, path.name) == path:
            os.replace(path, folder / path.name)
    shutil.rmtree(saved, ignore_errors=True)


def keep(path: Path, copy: Path) -> None:
    """A second name for a file, if there is one; a copy on file systems without such."""
    if os.path.lexists(path):
        try:
            os.link(path, copy, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(path, copy, follow_symlinks=False)


def outdate(new: Path, old: Path) -> None:
    """Makes a file the newer one of two: `current` goes by that."""
    now = max(time.time_ns(), old.stat().st_mtime_ns + 1 if old.exists() else 0)
    os.utime(new, ns=(now, now))


def restore(folder: Path, names: tuple[str, ...]) -> None:
    """Brings the files from before back: one of those that were to come could not be moved."""
    saved = folder / SAVED
    for name in names:
        if not (saved / name).exists():
            former = saved / FORMER / name
            os.replace(former, folder / name) if os.path.lexists(former) else (folder / name).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)


def sync(path: Path) -> None:
    """Brings a file or folder to the disk. Some file systems cannot do that for folders."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
