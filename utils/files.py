"""What strangers may have written, JSON above all: parsed strictly, checked for kind and range, quoted in short."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from utils.constants import UserError

LARGEST = 2**20  # bytes of JSON, some 3,000 epochs of a log; hostile, they take a fifth of a second to be parsed


def open_file(path):
    """A file, open to be read as bytes. Raises OSError, also for what is none: a pipe may never come to its end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return open(path, "rb")


def read_bytes(path, longest=LARGEST):
    """What a file holds. Raises OSError, and ValueError for more than `longest` bytes, unless that is None."""
    with open_file(path) as file:
        data = file.read(None if longest is None else longest + 1)
    if longest is not None and len(data) > longest:
        raise ValueError("it is too long")
    return data


def beside(path: str | Path, ending: str) -> Path:
    """The path of a file that belongs to `path` and lies beside it: its name with `ending` in place of its kind's.

    beside("runs/net.safetensors", ".jsonl") is runs/net.jsonl, and beside("runs/net-0.2", ".jsonl") is
    runs/net-0.2.jsonl, which Path.with_suffix would call runs/net-0.jsonl.
    """
    path = Path(path)
    name = path.name.removesuffix(".safetensors") if path.suffix == ".safetensors" else path.name.removesuffix(".json")
    return path.with_name(name + ending)


@contextlib.contextmanager
def locked(path):
    """Inside, no other process is inside with the same `path`, the file that is to be written. It can be nested.

    The operating system holds the lock for as long as this process lives, on an empty file beside `path`. One that was
    killed leaves that file behind, which the next run takes over and removes.
    Makes the folder if it is missing, and removes it if nothing has come to be in it.
    Raises UserError if another run has the lock, or there can be no file at `path`.
    """
    from filelock import FileLock, Timeout  # here, for it takes as long to import as the rest of the command line

    target = Path(path).resolve()  # where a link leads, the file is written
    missing: list[Path] = []  # of the folders above it, the innermost first
    try:
        try:
            missing += [folder for folder in target.parents if not folder.exists()]
            lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"{path} is being written by another run: wait for its end, or name another file") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        except ValueError as error:  # a root has no name
            raise UserError(f"{path} cannot be written: {error}") from None
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                with contextlib.suppress(OSError):  # Windows removes it by itself, and not while it is open
                    Path(lock.lock_file).unlink()
            lock.release()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def write_atomically(path, data):
    """Write bytes so that `path` holds, whatever happens, either what it held before or all of `data`."""
    path = Path(path).resolve()  # what a link points to is replaced, not the link
    temporary = temporary_of(path)
    with naming(path):
        temporary.unlink(missing_ok=True)  # of a writer that was killed; or a link, to be followed by nobody
        file = open(temporary, "xb")  # noqa: SIM115, for what another has made meanwhile is not ours to remove
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
def naming(path):
    """An OSError from inside is about `path`: a full disk does not say which file it refused."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def temporary_of(path):
    """Where `write_atomically` writes first, and what it leaves if it is killed; the next write there replaces it."""
    return path.with_name(f".{path.name}.tmp")
