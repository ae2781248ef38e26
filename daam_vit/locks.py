"""Lock a folder for one process, on every operating system; the lock is released even if the process is killed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from daam_vit.text import printable


@contextmanager
def hold(folder: Path, argument: str, what: str) -> Iterator[None]:
    """Hold a folder by locking its file `.lock`, which is not deleted; the file `.holder` names the process.

    Args:
        folder: an existing folder.
        argument: the argument that names it, for the error.
        what: the activity that needs the folder, for the error, such as "another build".

    Raises:
        ValueError: if another process, or another thread, holds it (the error says which), or if the file system of
            the folder has no locks.
    """
    lock, holder, shown = FileLock(folder / ".lock", thread_local=False), folder / ".holder", printable(str(folder))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError):  # it ends in this moment, or begins
            who = holder.read_text(encoding="utf-8")
        raise ValueError(
            f"{argument}: {what} is running in {shown}, by {who}; wait for it, or pass another folder"
        ) from None
    except NotImplementedError:
        raise ValueError(f"{argument}: {shown} is on a file system without locks; pass another folder") from None
    with held:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def give_back(lock: BaseFileLock) -> None:
    """Delete the file of a lock and release it."""
    with suppress(OSError):  # Windows deletes no open file
        os.unlink(lock.lock_file)  # before the release, so that nobody deletes the lock of the next one
    lock.release()
