"""Child processes that never outlive their parent, however that ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

# Reads until the parent's end of the pipe closes, then kills the child, and what it started in its session.
_WATCHDOG = ("/bin/sh", "-c", 'read -r _; kill -KILL "-$0" 2>/dev/null')


class Child:
    """One process. In a session of its own: a terminal's Ctrl-C reaches only the parent."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, watchdog: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._watchdog = watchdog

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path | None = None,
        directory: Path | None = None,
    ) -> Child:
        """Start `command` in `directory`, its output in `log`, or both as the parent's are. Raises OSError."""
        with log.open("ab") if log is not None else nullcontext() as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(env),
                cwd=directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            watchdog = await asyncio.create_subprocess_exec(
                *_WATCHDOG,
                str(process.pid),
                env=dict(env),  # not the parent's, which may hold more than the child may know
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except BaseException:  # a cancellation too: nobody else knows of the process yet
            process.kill()
            await process.wait()
            raise
        return cls(name, process, watchdog)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until it has ended."""
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs. SIGKILL, which it cannot pass on, goes to all of its session."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                if number is signal.SIGKILL:
                    os.killpg(self._process.pid, number)
                else:
                    self._process.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, and SIGKILL after `grace_s`. Returns its exit code."""
        self.send(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self.send(signal.SIGKILL)
        code = await self._process.wait()
        # Once the child is reaped its pid may be another's: the watchdog goes before the loop turns again.
        if self._watchdog.returncode is None:
            self._watchdog.kill()
        await self._watchdog.wait()
        return code
