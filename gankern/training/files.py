"""Files that are never half written, nor written by two runs at a time."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gankern import checks

TEMPORARY = ".tmp-"  # what the name of a file begins with until it is whole


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; at the end of the block that file, flushed to the disk, takes the place of `path` in one step.

    At whatever moment a process is killed or the power fails, `path` is the old file or the new one, whole. What a killed process
    leaves behind has a name that begins with TEMPORARY.

    Raises:
        OSError: it cannot be written; `path` is as it was then.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    with named(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError in the block that names no file, as those of a full disk, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def sync(path: Path) -> None:
    """Wait until the disk has this file, or the names in this directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, op: str) -> Iterator[None]:
    """Hold a lock on the directory `path`, by flock on its file .lock: it ends with the process, however that ends.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        ValueError: another holds it, who is named with host and process.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            checks.fail(ValueError, op, str(path), "not be in use by another process", file.read() or "one")
        except OSError:
            pass
        else:
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        yield
