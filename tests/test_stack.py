"""`tollgate up`, as whoever installs it runs it: a process of its own, and nothing left of it afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import pytest
import yaml
from openai.types.chat import ChatCompletionUserMessageParam

from extproc.limits import MAX_WORKERS
from extproc.local.valkey import LocalValkey, free_port
from extproc.providers import PROVIDERS

COMMAND = (sys.executable, "-m", "extproc")
QUESTION = ChatCompletionUserMessageParam(role="user", content="Hello")
_START_S = 60.0
_STOP_S = 20.0


class Stack:
    """One `tollgate up` in `state_dir`."""

    def __init__(self, state_dir: Path, **environment: str) -> None:
        self.state_dir = state_dir
        self.port = int(environment.get("PORT") or free_port())
        self.env = {
            "PATH": os.environ["PATH"],
            "TOLLGATE_STATE_DIR": str(state_dir),
            "PORT": str(self.port),
            "COLUMNS": "200",
        }
        self.env |= environment
        self.output = state_dir.parent / f"{state_dir.name}.out"
        self.process: subprocess.Popen[bytes] | None = None
        self.children: set[int] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def said(self) -> str:
        return self.output.read_text()

    def start(self) -> None:
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, "up"], env=self.env, stdout=output, stderr=output, start_new_session=True
            )

    def await_ready(self) -> None:
        assert self.process is not None
        eventually(
            lambda: self.process is not None and (self.process.poll() is not None or "try it:" in self.said),
            "the stack to be ready",
            _START_S,
        )
        assert self.process.poll() is None, self.said
        self.children = processes_with(str(self.state_dir)) - {self.process.pid}

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(_STOP_S)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command beside it."""
        command = [*COMMAND, *arguments]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)

    @property
    def token(self) -> str:
        return str(re.findall(r"^eyJ\S+$", self.said, re.M)[0])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token, max_retries=0)


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def processes_with(text: str) -> set[int]:
    """Processes that have `text` in their command line or environment, but for those that ended already."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if text.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
    return found


@contextmanager
def stack(**environment: str) -> Iterator[Stack]:
    directory = Path(tempfile.mkdtemp(prefix="tg"))
    (directory / "s").mkdir()
    one = Stack(directory / "s", **environment)
    one.start()
    try:
        one.await_ready()
        yield one
    finally:
        if one.process is not None and one.process.poll() is None:
            one.process.terminate()
            one.process.wait(_STOP_S)
        for pid in processes_with(str(one.state_dir)):  # a test has failed where there is one
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def up() -> Iterator[Stack]:
    with stack() as one:
        yield one


def assert_nothing_is_left(one: Stack) -> None:
    eventually(lambda: not processes_with(str(one.state_dir)), "every process to end")
    assert len(one.children) >= 5, "Envoy, the processor, the shipper, Valkey and their watchdogs were seen"
    # A process that is killed loses its memory, which /proc shows, before its sockets.
    eventually(lambda: not any(_answers(path) for path in one.state_dir.rglob("*.sock")), "every socket to close")
    eventually(lambda: _is_free(one.port), "the port to be free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


# While it runs --------------------------------------------------------------------------------------------------------


def test_it_says_what_it_does_and_when_it_is_ready(up: Stack) -> None:
    lines = up.said.splitlines()
    assert lines.count(f"ready {up.url}") == 1
    before = lines[: lines.index(f"ready {up.url}")]
    assert before == [
        "starting valkey",
        "starting a scripted provider, which replays recorded answers, for want of a key: openai, anthropic, gemini",
        "starting usage store",
        "starting processor",
        "starting envoy",
    ]


def test_the_curl_line_works_when_pasted(up: Stack) -> None:
    pasted = up.said.partition("try it:")[2]
    assert pasted.strip().startswith("curl -N ")
    result = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    events = [line for line in result.stdout.split("\n\n") if line]
    assert all(event.startswith("data: {") for event in events[:-1])
    assert events[-1] == "data: [DONE]"
    assert len(events) > 5


def test_the_official_client_works_unchanged(up: Stack) -> None:
    client = up.client()
    whole = client.chat.completions.create(model="gpt-4o", messages=[QUESTION])
    assert whole.choices[0].message.content
    chunks = list(client.chat.completions.create(model="gpt-4o", messages=[QUESTION], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    with pytest.raises(openai.AuthenticationError, match="ID token"):
        client.with_options(api_key="sk-mine").chat.completions.create(model="gpt-4o", messages=[QUESTION])


README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_what_readme_shows_of_the_official_clients_runs(up: Stack, number: int) -> None:
    code = SNIPPETS[number].replace("http://127.0.0.1:8080", up.url)
    assert up.url in code
    env = {"PATH": os.environ["PATH"], "TOKEN": up.token}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


def test_an_outage_is_answered_by_the_next_provider() -> None:
    """As README shows it: OpenAI's calls go where nobody listens."""
    with stack(OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1") as one:
        assert "for want of a key: anthropic, gemini\n" in one.said
        answer = one.client().chat.completions.create(model="gpt-4o", messages=[QUESTION])
        assert answer.choices[0].message.content
        assert answer.model.startswith("claude-")


def test_usage_and_budgets_are_shown(up: Stack) -> None:
    answer = up.client().chat.completions.with_raw_response.create(model="gpt-4o", messages=[QUESTION])
    request_id = answer.headers["x-request-id"]
    billed = answer.parse().usage

    def shipped() -> bool:
        result = up.run("usage", "--json")
        assert result.returncode == 0, result.stderr
        rows[:] = [row for row in json.loads(result.stdout) if row["request_id"] == request_id]
        return bool(rows)

    rows: list[dict[str, object]] = []
    eventually(shipped, "the usage record to be shipped")
    (row,) = rows
    assert billed is not None
    assert (row["prompt_tokens"], row["completion_tokens"]) == (billed.prompt_tokens, billed.completion_tokens)
    assert (row["status"], row["outcome"], row["user"]) == (200, "ok", "dev@example.com")
    budgets = json.loads(up.run("budgets", "--json").stdout)
    assert any(budget["posted"] > 0 for budget in budgets)
    assert all(budget["pending"] == 0 for budget in budgets)
    for command in ("usage", "budgets"):
        table = up.run(command)
        assert table.returncode == 0, table.stderr
        assert "dev@example.com" in table.stdout


def test_a_token_for_anyone(up: Stack) -> None:
    result = up.run("token", "--email", "ranker@example.iam.gserviceaccount.com")
    assert result.returncode == 0, result.stderr
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key=result.stdout.strip(), max_retries=0)
    assert client.chat.completions.create(model="gpt-4o", messages=[QUESTION])
    stranger = up.run("token", "--email", "eve@elsewhere.example").stdout.strip()
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=stranger).chat.completions.create(model="gpt-4o", messages=[QUESTION])


def test_check_finds_nothing_wrong(up: Stack) -> None:
    result = up.run("check")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{up.state_dir / 'policy.yaml'}: no problems\n"


def test_a_second_one_says_so_in_one_line(up: Stack) -> None:
    again = subprocess.run(
        [*COMMAND, "up"],
        env=up.env | {"PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (again.returncode, again.stdout) == (1, "")
    assert up.process is not None
    assert again.stderr == f"tollgate: a stack already runs in {up.state_dir}: pid {up.process.pid}, {up.url}\n"
    assert up.client().chat.completions.create(model="gpt-4o", messages=[QUESTION])


def test_a_taken_port_is_said_in_one_line(up: Stack, tmp_path: Path) -> None:
    env = up.env | {"TOLLGATE_STATE_DIR": str(tmp_path)}
    result = subprocess.run([*COMMAND, "up"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"tollgate: port {up.port} is taken: set PORT to another one\n"
    assert processes_with(str(tmp_path)) == set()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PORT": "http"}, "PORT must be a port number, not 'http'"),
        ({"OPENAI_BASE_URL": "ftp://x"}, "OPENAI_BASE_URL must be a plain http:// or https:// URL"),
        ({"REDIS_URL": "localhost"}, "REDIS_URL must begin with"),
        ({"REDIS_URL": "redis://localhost:none"}, "REDIS_URL must have"),
        ({"TOLLGATE_POLICY": "/nowhere/policy.yaml"}, "/nowhere/policy.yaml"),
        ({"TOLLGATE_WORKERS": "abc"}, f"TOLLGATE_WORKERS must be a whole number from 1 to {MAX_WORKERS}"),
        ({"TOLLGATE_WORKERS": "0"}, "TOLLGATE_WORKERS must be"),
        ({"TOLLGATE_NAMESPACE": "{a}"}, "TOLLGATE_NAMESPACE must not have"),
        ({"TOLLGATE_SECRETS_DIR": "/nowhere"}, "TOLLGATE_SECRETS_DIR is not a directory"),
    ],
    ids=["port", "base URL", "Redis", "Redis's port", "policy", "workers", "no workers", "namespace", "secrets"],
)
def test_a_wrong_setting_is_said_in_one_line(environment: dict[str, str], reason: str, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "TOLLGATE_STATE_DIR": str(tmp_path), "PORT": str(free_port()), **environment}
    result = subprocess.run([*COMMAND, "up"], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


# The end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_everything_well(number: signal.Signals) -> None:
    with stack() as one:
        assert one.end(number) == 0
        assert one.said.endswith("stopping\n")
        assert_nothing_is_left(one)


def test_a_signal_while_it_starts_ends_everything_too() -> None:
    directory = Path(tempfile.mkdtemp(prefix="tg"))
    (directory / "s").mkdir()
    one = Stack(directory / "s")
    one.start()
    try:
        eventually(lambda: "starting processor" in one.said, "the stack to be starting")
        assert one.end(signal.SIGTERM) == 0
        eventually(lambda: not processes_with(str(one.state_dir)), "every process to end")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_a_part_that_dies_ends_the_rest_and_is_named() -> None:
    with stack() as one:
        (envoy,) = [pid for pid in one.children if b"--config-path" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(envoy, signal.SIGKILL)
        assert one.process is not None
        assert one.process.wait(_STOP_S) == 1
        assert one.said.splitlines()[-1].startswith("tollgate: the envoy ended with code -9: ")
        assert_nothing_is_left(one)


def test_a_kill_leaves_no_process_behind_and_it_starts_again() -> None:
    with stack() as one:
        assert one.client().chat.completions.create(model="gpt-4o", messages=[QUESTION])
        one.end(signal.SIGKILL)
        assert_nothing_is_left(one)
        one.start()
        one.await_ready()
        budgets = json.loads(one.run("budgets", "--json").stdout)
        assert any(budget["posted"] > 0 for budget in budgets), "what was spent is not forgotten"
        assert one.end(signal.SIGTERM) == 0


# Other providers, other Redises ---------------------------------------------------------------------------------------


def test_a_provider_and_a_redis_of_ones_own(up: Stack) -> None:
    """The provider is the other stack's gateway: it speaks OpenAI's API, and takes a token of its own as the key."""
    directory = Path(tempfile.mkdtemp(prefix="tg"))
    try:
        with (
            LocalValkey(directory / "v") as valkey,
            stack(
                OPENAI_BASE_URL=f"{up.url}/v1",
                OPENAI_API_KEY=up.token,
                ANTHROPIC_BASE_URL=up.url,
                GEMINI_API_KEY="canary-of-gemini",
                REDIS_URL=valkey.url,
            ) as one,
        ):
            assert _of_whom(one, up.token) == {"extproc serve"}
            assert stat.S_IMODE((one.state_dir / "stack.env").stat().st_mode) == 0o600
            assert "starting valkey" not in one.said
            assert "scripted provider" not in one.said
            assert not (one.state_dir / "valkey").exists()
            answer = one.client().chat.completions.with_raw_response.create(model="gpt-4o", messages=[QUESTION])
            assert answer.parse().choices[0].message.content

            theirs = answer.headers["x-request-id"]
            assert theirs not in up.run("usage", "--json").stdout, "each gateway has ids of its own"
            budgets = json.loads(one.run("budgets", "--json").stdout)
            assert any(budget["posted"] > 0 for budget in budgets)
            assert up.token not in "".join(path.read_text() for path in one.state_dir.glob("*.log"))
            assert one.end(signal.SIGTERM) == 0
            assert_nothing_is_left(one)
            assert valkey.pid, "it is not the stack's to stop"
            assert any(_answers(path) for path in (directory / "v").glob("*.sock"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _of_whom(one: Stack, key: str) -> set[str]:
    """The children that have a provider's key in their environment, or whose watchdogs have."""
    found = set()
    for pid in one.children:
        if key.encode() in Path(f"/proc/{pid}/environ").read_bytes():
            command = _command(pid)
            found.add(" ".join((_command(int(command[-1])) if command[0] == "/bin/sh" else command)[2:4]))
    return found


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def places_of(one: Stack) -> dict[str, dict[str, object]]:
    """Where Envoy looks for each provider."""
    clusters = yaml.safe_load((one.state_dir / "envoy.yaml").read_text())["static_resources"]["clusters"]
    hosts = {
        c["name"]: c["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        for c in clusters
        if c["name"] in PROVIDERS
    }
    return {name: host["address"]["socket_address"] for name, host in hosts.items()}


POLICY_OF_ONES_OWN = """
identity: {audiences: [a], issuers: [https://accounts.google.com], allow: ["*"]}
models: {mini: {targets: [openai/gpt-4o-mini]}}
"""


def test_a_key_in_a_file_and_a_policy_of_ones_own(tmp_path: Path) -> None:
    """What has a key is no scripted provider. What is printed names a caller and a model that the policy lets in."""
    (tmp_path / "policy.yaml").write_text(POLICY_OF_ONES_OWN)
    (tmp_path / "OPENAI_API_KEY").write_text("sk-canary-0123456789")
    (tmp_path / "GEMINI_API_KEY").write_text("sk-canary-of-gemini")
    environment = {
        "TOLLGATE_SECRETS_DIR": str(tmp_path),
        "TOLLGATE_POLICY": str(tmp_path / "policy.yaml"),
        "LOCAL_BASE_URL": "http://127.0.0.1:1/v1",
    }
    with stack(**environment) as one:
        assert "for want of a key: anthropic\n" in one.said
        places = places_of(one)
        assert places["openai"] == {"address": "api.openai.com", "port_value": 443}
        assert places["gemini"] == {"address": "generativelanguage.googleapis.com", "port_value": 443}
        assert places["anthropic"]["address"] == "127.0.0.1"
        assert places["local"] == {"address": "127.0.0.1", "port_value": 1}
        assert places.keys() == {"openai", "gemini", "anthropic", "local"}, "the others have no key"
        assert "for dev@example.com" in one.said
        assert '"model": "mini"' in one.said
        with pytest.raises(openai.BadRequestError) as raised:
            one.client().chat.completions.create(model="gpt-4o", messages=[QUESTION])
        assert raised.value.code == "model_not_found", "the caller was let in"
