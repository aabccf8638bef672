"""The policy file on disk: read at the start, read again when it changes, kept as it was when the change is no good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from extproc.errors import PolicyInvalid
from extproc.limits import MAX_POLICY_BYTES, POLICY_POLL_S
from extproc.records import Policy

log = logging.getLogger(__name__)

_Fingerprint = tuple[int, int, int]


class PolicyFile:
    """Holds the last good policy of `path`. `on_change` is called on the event loop with each one that replaces it.

    Polled, not watched: editors replace files, and mounted secrets and config maps are symbolic links that move.
    """

    def __init__(self, path: Path, parse: Callable[[str], Policy], on_change: Callable[[Policy], None]) -> None:
        """Read `path`. Raises PolicyInvalid, also where there is no such file."""
        self._path = path
        self._parse = parse
        self._on_change = on_change
        self._seen = _fingerprint(path)
        self._policy = self._load()
        self._task: asyncio.Task[None] | None = None

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy

    def start(self) -> None:
        """Begin to look for changes, every second."""
        self._task = asyncio.get_running_loop().create_task(self._poll())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def reload_now(self) -> bool:
        """Look once. Whether a new policy is in force; one that cannot be used is logged, once for each change."""
        fingerprint = await asyncio.to_thread(_fingerprint, self._path)
        if fingerprint == self._seen:
            return False
        self._seen = fingerprint
        try:
            policy = await asyncio.to_thread(self._load)  # checking a large policy takes longer than a stream may wait
        except PolicyInvalid as error:
            log.warning("the policy %s is refused, the one before stays in force:\n%s", self._path, error)
            return False
        if policy.version == self._policy.version:
            return False
        self._policy = policy
        log.info("the policy %s is in force, version %s", self._path, policy.version)
        self._on_change(policy)
        return True

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLICY_POLL_S)
            try:
                await self.reload_now()
            except Exception:  # a defect here must not end reloading for good
                log.exception("the policy %s could not be reloaded", self._path)

    def _load(self) -> Policy:
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_POLICY_BYTES + 1)
            return self._parse(content.decode())
        except OSError as error:
            raise PolicyInvalid((f"the file cannot be read: {error.strerror}",)) from error
        except UnicodeDecodeError as error:
            raise PolicyInvalid((f"the file is not UTF-8 at byte {error.start}",)) from error


def _fingerprint(path: Path) -> _Fingerprint | None:
    """Taken before the file is read: a change in between is then seen as a change, and read again."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
