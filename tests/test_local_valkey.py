"""The embedded Valkey: it starts, is killed and comes back at one address, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import Redis

from extproc.local.valkey import LocalValkey, ValkeyFailed, free_port


def gone(pid: int) -> bool:
    """Whether the process ends within five seconds; a zombie that nobody reaped has ended too."""
    for _ in range(1_000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.005)
    return False


def test_it_serves_on_its_socket_and_never_evicts(tmp_path: Path) -> None:
    with LocalValkey(tmp_path) as server, Redis.from_url(server.url) as client:
        assert server.url == f"unix://{tmp_path}/valkey.sock"
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        pid = server.pid
    assert gone(pid)
    assert [path.name for path in tmp_path.iterdir()] == ["valkey.log"]


def test_with_a_port_it_serves_over_tcp_and_the_socket(tmp_path: Path) -> None:
    with LocalValkey(tmp_path, port=free_port()) as server:
        assert server.url == f"redis://127.0.0.1:{server.port}/0"
        with Redis.from_url(server.url) as client, Redis(unix_socket_path=str(server.socket_path)) as local:
            client.set("key", 1)
            assert local.get("key") == b"1"


@pytest.mark.parametrize("appendonly", [True, False], ids=["appendonly", "memory"])
def test_killed_it_comes_back_at_the_same_address(tmp_path: Path, appendonly: bool) -> None:
    config = {"appendfsync": "always"}
    server = LocalValkey(tmp_path, port=free_port(), appendonly=appendonly, config=config)
    with server, Redis.from_url(server.url) as client:
        client.set("key", 1)
        url, pid = server.url, server.pid
        server.kill()
        assert gone(pid)
        with pytest.raises(ValkeyFailed):
            _ = server.pid
        server.start()
        assert server.url == url
        assert client.get("key") == (b"1" if appendonly else None)


def test_stopping_twice_is_stopping_once(tmp_path: Path) -> None:
    server = LocalValkey(tmp_path).start()
    server.stop()
    server.stop()
    server.kill()


def test_a_second_server_does_not_take_the_first_one_s_socket(tmp_path: Path) -> None:
    with LocalValkey(tmp_path) as first:
        with pytest.raises(ValkeyFailed, match="already runs"):
            LocalValkey(tmp_path).start()
        with Redis.from_url(first.url) as client:
            assert client.ping()


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValkeyFailed, match="no-such-directive"):
        LocalValkey(tmp_path, config={"no-such-directive": "1"}).start()
    assert [path.name for path in tmp_path.iterdir()] == ["valkey.log"]


def test_a_path_too_long_for_a_socket_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValkeyFailed, match="too long"):
        LocalValkey(tmp_path / ("x" * 100)).start()


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from extproc.local.valkey import LocalValkey\n"
        "server = LocalValkey(Path(sys.argv[1])).start(); print(server.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert gone(pid)
