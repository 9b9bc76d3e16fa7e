"""Files: written atomically, locked while they are written, and read with care, since they may come from anyone."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils.constants import UserError


def open_file(path: str | Path) -> BinaryIO:
    """A file, open for reading bytes. Raises OSError, also if it is not a regular file: a pipe may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return open(path, "rb")


def read_bytes(path: str | Path, longest: int | None) -> bytes:
    """The contents of a file. Raises OSError, and ValueError if they have more than `longest` bytes (None: any)."""
    with open_file(path) as file:
        data = file.read(None if longest is None else longest + 1)  # type: ignore[arg-type]
    if longest is not None and len(data) > longest:
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


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """A context in which this process alone may write the file `path`. Contexts of the same process can be nested.

    The operating system holds the lock on an empty file beside `path` until this process ends. A killed process leaves
    that file behind; the next run takes it over and removes it.
    Makes the folder if it is missing, and removes it afterwards if it is still empty.
    Raises UserError if another run has the lock, or if `path` cannot be written.
    """
    from filelock import FileLock, Timeout  # imported late: it takes as long as the rest of the command line

    target = Path(path).resolve()  # a link is followed, because its target is what gets written
    missing: list[Path] = []  # folders, the innermost first
    try:
        try:
            missing += [folder for folder in target.parents if not folder.exists()]
            lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
            target.parent.mkdir(parents=True, exist_ok=True)
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
                    Path(lock.lock_file).unlink()
            lock.release()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that, whatever happens, `path` holds either its earlier contents or all of `data`.

    Raises OSError, which names `path`, if the disk is full, say.
    """
    path = Path(path).resolve()  # a link stays a link: its target is replaced
    temporary = temporary_of(path)
    with naming(path):
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link that must not be followed
        file = open(temporary, "xb")  # noqa: SIM115, because a file that another process made meanwhile is not removed
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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
