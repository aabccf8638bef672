"""Files that belong to one living process: it holds an exclusive flock, which the kernel lets go when it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def create(path: Path) -> int | None:
    """Create a file to append to, and own it: its descriptor, or None where the name is taken. Raises OSError."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY, 0o600)
    except FileExistsError:
        return None
    fcntl.flock(fd, fcntl.LOCK_EX)
    if os.fstat(fd).st_nlink == 0:  # between the two calls somebody took it for a dead owner's, and deleted it
        os.close(fd)
        return create(path)
    return fd


def take(fd: int) -> bool:
    """Own an open file whose owner is gone. False where the owner lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
