"""One run for each output: two that wrote the same files would each undo what the other did."""

import contextlib
from pathlib import Path

from utils import UserError


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
