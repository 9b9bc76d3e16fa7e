"""Files: written atomically, locked while they are written, and read with care, since they may come from anyone."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from utils.constants import UserError

STATE_NAMES = ("*.partial.*", ".*.tmp", ".*.lock", ".*.probe")  # of files that the project makes and removes itself


def open_file(path: str | Path) -> BinaryIO:
    """A file, open for reading bytes. Raises OSError, at once too if it is not a regular file: a pipe may never end."""
    _check_regular(os.stat(path), path)  # before it is opened: opening a device may change something

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe may have come into its place

    file = open(path, "rb", opener=at_once)  # noqa: SIM115, because the caller closes it
    try:
        _check_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))


def read_bytes(path: str | Path, longest: int) -> bytes:
    """The contents of a file. Raises OSError, and ValueError if they have more than `longest` bytes."""
    with open_file(path) as file:
        # The size is asked first: most of a huge file may be nowhere on the disk.
        data = file.read(longest + 1) if os.fstat(file.fileno()).st_size <= longest else None
    if data is None or len(data) > longest:
        raise ValueError(f"it is longer than {longest:,} bytes")
    return data


def beside(path: str | Path, ending: str) -> Path:
    """The path of a file that belongs to `path` and lies beside it: `ending` replaces .safetensors or .json.

    beside("runs/net.safetensors", ".jsonl") is runs/net.jsonl, and beside("runs/net-0.2", ".jsonl") is
    runs/net-0.2.jsonl, which Path.with_suffix would call runs/net-0.jsonl.
    """
    path = Path(path)
    name = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(name + ending)


def resolved(path: str | Path) -> Path:
    """The path without links. A loop of links stays as it is, and whoever opens it gets an OSError."""
    return Path(os.path.realpath(path))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that they outlast a power cut. Raises OSError."""
    missing = _missing(folder)
    os.makedirs(folder, exist_ok=True)
    for each in missing:
        _sync(each.parent)


def _missing(folder: Path) -> list[Path]:
    """The folders that are to be made, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """A context in which this process alone may write the file `path`. Contexts of the same process can be nested.

    The operating system holds the lock on an empty file beside `path` until this process ends. A killed process leaves
    that file behind; the next run takes it over and removes it.
    Makes the folder if it is missing, and removes it afterwards if it is still empty.
    Raises UserError if another run has the lock, if `path` cannot be written, or if its name is one of STATE_NAMES.
    """
    from filelock import FileLock, Timeout  # imported late: it takes as long as the rest of the command line

    target = resolved(path)  # a link is followed, because its target is what gets written
    if any(fnmatch(target.name.lower(), pattern) for pattern in STATE_NAMES):
        raise UserError(f"{path} cannot be written: the names {', '.join(STATE_NAMES)} are kept for unfinished work")
    missing: list[Path] = []  # folders, the innermost first
    try:
        try:
            lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
            missing += _missing(target.parent)
            make_folder(target.parent)
            with contextlib.suppress(FileNotFoundError):  # the longest name that state beside this file may have
                os.lstat(target.with_name(f".{target.name}.attacks.partial.jsonl.tmp"))
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{path} is being written by another run: wait until it finishes, or choose another file"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        except ValueError as error:  # the root folder has no name
            raise UserError(f"{path} cannot be written: {error}") from None
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                with contextlib.suppress(OSError):  # Windows removes the file itself, and refuses while it is open
                    os.unlink(lock.lock_file)
            lock.release()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                os.rmdir(folder)


def write_atomically(path: str | Path, data: bytes, like: str | Path | None = None) -> None:
    """Write a file so that, whatever happens, `path` holds either its earlier contents or all of `data`.

    When this returns, `data` is on the disk and outlasts a power cut. A file that is replaced keeps its mode.
    like: a file whose mode a new file gets, if it is there: the state of a private checkpoint's training is private.
    Raises OSError, which names `path`, if the disk is full, say, or if there is something else than a file.
    """
    path = resolved(path)  # a link stays a link: its target is replaced
    temporary = temporary_of(path)
    with naming(path):
        mode = None
        for model in [path] if like is None else [like, path]:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(model)
                _check_regular(status, model)
                mode = stat.S_IMODE(status.st_mode)
        remove(temporary)  # left by a killed process, or a link that must not be followed
        file = open(temporary, "xb")  # noqa: SIM115, because a file that another process made meanwhile is not removed
        try:
            with file:
                if mode not in (None, stat.S_IMODE(os.fstat(file.fileno()).st_mode)):
                    os.chmod(temporary, mode)  # type: ignore[arg-type]  # before anyone can read the contents
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(temporary)
            raise
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make what was made or renamed in a folder outlast a power cut, where the system can: Windows cannot."""
    if os.name == "nt":
        return
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be written but not read
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def append(path: str | Path, data: bytes) -> None:
    """Add to the end of a file. A kill or a full disk may leave a part of `data`, and a power cut may lose it.

    Raises OSError, which names `path`.
    """
    with naming(path), open(path, "ab") as file:
        file.write(data)


def remove(path: Path) -> None:
    """Remove a file if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A context whose OSErrors name `path`: the error of a full disk does not say which file was being written."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def temporary_of(path: Path) -> Path:
    """Where `write_atomically` writes first. A killed process leaves this file, and the next write replaces it."""
    return path.with_name(f".{path.name}.tmp")
