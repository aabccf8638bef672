from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from google.auth import jwt

from extproc import cli
from extproc.budget import window_at
from extproc.envoy_config import TEMPLATE
from extproc.ledger import Ledger
from extproc.limits import MIB
from extproc.local.issuer import DevIssuer
from extproc.local.valkey import LocalValkey
from extproc.policy import parse_policy
from extproc.records import (
    Amount,
    Balance,
    Budget,
    BudgetSnapshot,
    Hold,
    HoldAsk,
    Mode,
    Scope,
    Settlement,
    Unit,
    UsageRecord,
    Window,
)
from extproc.usage import views
from extproc.usage.journal import Journal, encode
from extproc.usage.shipper import Shipper
from extproc.usage.sinks import UsageRow
from extproc.usage.sinks.duckdb import DuckDbSink
from tests.usage_rows import usage_record

POLICY = """
identity:
  audiences: [https://first.example, https://second.example]
  issuers: [https://dev.tollgate.local]
  allow: ["*@example.com"]
models:
  "*": {targets: ["openai/*"]}
budgets:
  - {scope: service, id: "*", window: day, limit_usd: 5}
  - {scope: user, id: "alice@example.com", window: total, limit_tokens: 1000, mode: soft}
  - {scope: global, window: month, limit_usd: 2000, mode: shadow}
"""
GLOBAL = Budget("global/*/month/usd/shadow", Unit.NANOUSD, 2000 * 10**9, Window.MONTH, "UTC", Mode.SHADOW)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of every command, with a policy, and nothing of ours in the environment."""
    for name in list(os.environ):
        if name.startswith("TOLLGATE_") or name in ("REDIS_URL", "COLUMNS"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path


def tollgate(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=env)


def fails_in_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for part in ("Error: ", *parts):
        assert part in line


# token ----------------------------------------------------------------------------------------------------------------


class TestToken:
    @pytest.fixture(autouse=True)
    def issuer(self, directory: Path) -> DevIssuer:
        return DevIssuer.open(directory / ".tollgate")

    @pytest.mark.parametrize(
        ("arguments", "audience", "ttl_s"),
        [
            ((), "https://first.example", 3600),
            (("--aud", "https://other.example", "--ttl", "5"), "https://other.example", 5),
        ],
        ids=["defaults", "given"],
    )
    def test_is_of_the_development_issuer(
        self, issuer: DevIssuer, arguments: tuple[str, ...], audience: str, ttl_s: int
    ) -> None:
        result = tollgate("token", "--email", "alice@example.com", *arguments)
        assert result.exit_code == 0
        claims = jwt.decode(result.stdout.strip(), certs=issuer.certificates(), audience=audience)  # type: ignore[no-untyped-call]
        assert claims["email"] == "alice@example.com"
        assert claims["exp"] - claims["iat"] == ttl_s

    @pytest.mark.parametrize("ttl_s", [0, 86_401])
    def test_lives_no_longer_than_the_gateway_accepts(self, ttl_s: int) -> None:
        assert tollgate("token", "--email", "a@example.com", "--ttl", "86400").exit_code == 0
        result = tollgate("token", "--email", "a@example.com", "--ttl", str(ttl_s))
        assert (result.exit_code, result.stdout) == (2, "")
        assert "1<=x<=86400" in result.stderr

    def test_needs_a_policy_for_its_audience(self, directory: Path) -> None:
        (directory / "policy.yaml").unlink()
        fails_in_one_line(tollgate("token", "--email", "a@example.com"), "policy.yaml", "No such file")
        assert tollgate("token", "--email", "a@example.com", "--aud", "x").exit_code == 0

    def test_without_a_stack(self, directory: Path) -> None:
        shutil.rmtree(directory / ".tollgate")
        fails_in_one_line(tollgate("token", "--email", "a@example.com"), ".tollgate", "is the stack running?")
        assert not (directory / ".tollgate").exists()

    def test_with_a_key_that_is_none(self, directory: Path) -> None:
        (directory / ".tollgate" / "dev-issuer.pem").write_text("nonsense")
        fails_in_one_line(tollgate("token", "--email", "a@example.com"), "dev-issuer.pem")


# usage ----------------------------------------------------------------------------------------------------------------


class TestUsage:
    @pytest.fixture
    def records(self, directory: Path) -> list[UsageRecord]:
        records = [usage_record(f"r{number:02}", ts=f"2026-11-23T16:00:{number:02}.000Z") for number in range(30)]
        (directory / ".tollgate").mkdir()
        DuckDbSink(directory / ".tollgate" / "usage.duckdb").write("s", 1, [UsageRow(record) for record in records])
        return records

    def test_in_json_is_an_array_of_all_records(self, records: list[UsageRecord]) -> None:
        result = tollgate("usage", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == [dataclasses.asdict(record) for record in records]

    def test_in_json_can_be_the_last_few(self, records: list[UsageRecord]) -> None:
        shown = json.loads(tollgate("usage", "--json", "--last", "2").stdout)
        assert [record["request_id"] for record in shown] == ["r28", "r29"]

    @pytest.mark.usefixtures("records")
    def test_as_a_table_is_the_last_20_in_80_columns(self) -> None:
        header, *lines = tollgate("usage").stdout.splitlines()
        assert header.split() == ["time", "caller", "model", "outcome", "in", "out", "cost", "ms"]
        assert [line.split()[0] for line in lines] == [f"16:00:{number}" for number in range(10, 30)]
        assert max(map(len, [header, *lines])) <= 80

    @pytest.mark.usefixtures("records")
    def test_wide_has_every_field_on_one_line(self) -> None:
        header, line = tollgate("usage", "--wide", "--last", "1").stdout.splitlines()
        assert header.split() == [field.name for field in dataclasses.fields(UsageRecord)]
        assert line.split()[0] == "r29"

    def test_of_no_requests(self, directory: Path) -> None:
        (directory / ".tollgate").mkdir()
        DuckDbSink(directory / ".tollgate" / "usage.duckdb")
        assert tollgate("usage").stdout == "no requests yet\n"
        assert tollgate("usage", "--json").stdout == "[]\n"

    def test_without_a_stack(self) -> None:
        fails_in_one_line(tollgate("usage"), ".tollgate/usage.duckdb", "is the stack running?")

    def test_of_a_store_that_is_none(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("extproc.usage.sinks.duckdb._OPEN_TIMEOUT_S", 0)
        (directory / "other").write_text("nonsense" * 1000)
        fails_in_one_line(tollgate("usage", env={"TOLLGATE_USAGE_DB": "other"}), "not a valid DuckDB")


# report ---------------------------------------------------------------------------------------------------------------


class TestReport:
    @pytest.fixture(autouse=True)
    def store(self, directory: Path) -> None:
        """A journal, shipped as `tollgate ship` does it: two requests of today, one of the day before, one orphan."""
        now = datetime.now(UTC)
        records = [
            usage_record("a", ts=now.isoformat(), cost_nanousd=1),
            usage_record("b", ts=now.isoformat(), cost_nanousd=2_750_001),
            usage_record("c", ts=(now - timedelta(days=1)).isoformat(), cost_nanousd=7),
        ]
        journal = Journal(directory / ".tollgate" / "journal", max_bytes=MIB, clock=lambda: 1)
        for record in records:
            journal.append(record)
        journal.append_orphan(records[0])
        journal.close()
        sink = DuckDbSink(directory / ".tollgate" / "usage.duckdb")
        shipper = Shipper(directory / ".tollgate" / "journal", sink)
        shipper.ship_once()
        shipper.close()
        look = BudgetSnapshot(
            now.isoformat(), "b/day/usd", Scope.USER, Window.DAY, Unit.NANOUSD, Mode.HARD, 5, 7, 0, None
        )
        sink.write_snapshots([look])

    def test_without_a_name_lists_them(self) -> None:
        header, *lines = tollgate("report").stdout.splitlines()
        assert header.split() == ["report", "what", "it", "says"]
        assert [line.split()[0] for line in lines] == sorted(view.name for view in views.load())

    @pytest.mark.parametrize("view", [view.name for view in views.load()])
    def test_every_view_runs_on_the_local_store(self, view: str) -> None:
        result = tollgate("report", view, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        assert isinstance(json.loads(result.stdout), list)
        assert tollgate("report", view).exit_code == 0

    def test_is_of_so_many_days_and_exact(self) -> None:
        (today,) = json.loads(tollgate("report", "spend_daily", "--json", "--days", "1").stdout)
        assert (today["day"], today["requests"], today["cost_nanousd"]) == (f"{datetime.now(UTC):%F}", 2, 2_750_002)
        both = json.loads(tollgate("report", "spend_daily", "--json", "--days", "2").stdout)
        assert [day["cost_nanousd"] for day in both] == [7, 2_750_002]

    def test_times_are_utc_text(self) -> None:
        (budget,) = json.loads(tollgate("report", "budget_burn_down", "--json").stdout)
        assert datetime.fromisoformat(budget["ts"]).tzinfo is UTC
        assert (budget["left_amount"], budget["resets_at"]) == (-2, None)

    def test_as_a_table(self) -> None:
        header, line = tollgate("report", "spend_daily", "--days", "1").stdout.splitlines()
        assert header.split()[-2:] == ["reasoning_tokens", "cost"]
        assert line.split()[-1] == "$0.002750"

    def test_where_there_is_nothing(self) -> None:
        assert tollgate("report", "failovers").stdout == "nothing to report\n"
        assert tollgate("report", "failovers", "--json").stdout == "[]\n"

    def test_that_there_is_not(self) -> None:
        fails_in_one_line(tollgate("report", "nothing"), "no report 'nothing'", "spend_daily")

    def test_without_a_store(self, directory: Path) -> None:
        (directory / ".tollgate" / "usage.duckdb").unlink()
        fails_in_one_line(tollgate("report", "usage"), ".tollgate/usage.duckdb", "is the stack running?")

    def test_where_usage_goes_to_bigquery(self) -> None:
        store = {"TOLLGATE_USAGE_STORE": "bigquery://my-project/usage"}
        fails_in_one_line(tollgate("report", "latency", env=store), "my-project.usage.latency")


# budgets --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalValkey]:
    with LocalValkey(tmp_path_factory.mktemp("valkey")) as valkey:
        yield valkey


class TestBudgets:
    @pytest.fixture
    def stack(self, directory: Path, valkey: LocalValkey, request: pytest.FixtureRequest) -> None:
        """What a running stack writes for the command, with a ledger of the test's own."""
        (directory / ".tollgate").mkdir()
        lines = f"REDIS_URL={valkey.url}\nTOLLGATE_NAMESPACE={request.node.name}\n"
        (directory / ".tollgate" / "stack.env").write_text(lines)

    @pytest.mark.usefixtures("stack")
    def test_that_are_for_one_name_are_shown_before_their_first_use(self) -> None:
        budgets = json.loads(tollgate("budgets", "--json").stdout)
        assert [(budget["id"], budget["posted"], budget["left"]) for budget in budgets] == [
            ("user/alice@example.com/total/tokens/soft", 0, 1000),
            ("global/*/month/usd/shadow", 0, 2000 * 10**9),
        ]

    @pytest.mark.usefixtures("stack")
    def test_have_what_is_posted_and_pending(self, valkey: LocalValkey, request: pytest.FixtureRequest) -> None:
        async def spend() -> None:
            ledger = Ledger(valkey.url, namespace=request.node.name)
            for request_id in ("settled", "open"):
                held = await ledger.hold(HoldAsk(request_id, (GLOBAL,), Amount(10**9, 10), Amount(10**9, 10)))
                assert isinstance(held, Hold)
                if request_id == "settled":
                    await ledger.settle(Settlement(request_id, held.windows, Amount(3 * 10**9, 10)))
            await ledger.close()

        asyncio.run(spend())
        result = tollgate("budgets", "--json")
        shown = {budget["id"]: budget for budget in json.loads(result.stdout)}
        assert len(shown) == 2
        budget = shown[GLOBAL.id]
        assert (budget["posted"], budget["pending"], budget["left"]) == (3 * 10**9, 10**9, 1996 * 10**9)
        assert budget["resets_at_ms"] > time.time() * 1000

        lines = tollgate("budgets").stdout.splitlines()
        assert lines[0].split() == ["budget", "mode", "limit", "posted", "pending", "left", "resets", "in"]
        (line,) = (line for line in lines if "/shadow" in line)
        assert line.split()[1:6] == ["shadow", "$2,000.00", "$3.000000", "$1.000000", "$1,996.00"]
        assert max(map(len, lines)) <= 80

    @pytest.mark.usefixtures("stack")
    def test_of_a_policy_without_any(self, directory: Path) -> None:
        (directory / "policy.yaml").write_text(POLICY[: POLICY.index("budgets:")])
        assert tollgate("budgets").stdout == "no budgets in use\n"

    @pytest.mark.usefixtures("stack")
    def test_need_a_policy(self, directory: Path) -> None:
        (directory / "policy.yaml").unlink()
        fails_in_one_line(tollgate("budgets"), "policy.yaml", "No such file")

    @pytest.mark.usefixtures("stack")
    def test_the_real_environment_comes_first(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        url = f"redis://user:secret@127.0.0.1:{port}/0"
        result = tollgate("budgets", env={"REDIS_URL": url})
        fails_in_one_line(result, "ledger", "is the stack running?")
        assert "secret" not in result.stderr

    @pytest.mark.parametrize("url", ["127.0.0.1:6379", "redis://127.0.0.1:6379/database"])
    def test_of_an_address_that_is_none(self, url: str) -> None:
        fails_in_one_line(tollgate("budgets", env={"REDIS_URL": url}))


@pytest.mark.parametrize("used", [False, True], ids=["untouched", "used"])
def test_a_budget_is_shown_once(used: bool) -> None:
    policy = parse_policy(POLICY)
    now_ms = 1_763_852_400_000
    balances = (Balance(GLOBAL, 5, 0, window_at(GLOBAL, now_ms).end_ms),) if used else ()
    shown = cli.with_untouched(balances, policy, now_ms)
    assert [balance.budget.id for balance in shown].count(GLOBAL.id) == 1
    (balance,) = (balance for balance in shown if balance.budget.id == GLOBAL.id)
    assert balance == Balance(GLOBAL, 5 if used else 0, 0, window_at(GLOBAL, now_ms).end_ms)


# check ----------------------------------------------------------------------------------------------------------------


class TestCheck:
    @pytest.fixture(autouse=True)
    def envoy_problems(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What Envoy has to say, for tests of the policy; one below asks the real one."""
        problems: list[str] = []
        monkeypatch.setattr("extproc.local.envoy_check.problems", lambda path: [f"{path}: {p}" for p in problems])
        return problems

    def test_of_a_good_policy(self) -> None:
        result = tollgate("check")
        assert result.exit_code == 0
        assert result.stdout == "policy.yaml: no problems\n"

    def test_names_file_line_field_and_what(self, directory: Path) -> None:
        (directory / "other.yaml").write_text(POLICY.replace("limit_usd: 5", "limit_usd: five").replace("day", "dai"))
        result = tollgate("check", "other.yaml")
        assert result.exit_code == 1
        lines = result.stdout.splitlines()
        assert len(lines) == 2
        assert all(line.startswith("other.yaml:9: budgets[0]") for line in lines)

    def test_names_what_envoy_has_no_chain_for(self, directory: Path) -> None:
        (directory / "other.yaml").write_text(POLICY.replace('"*": {', 'x: {targets: [mistral/x, openai/y]}\n  "*": {'))
        result = tollgate("check", "other.yaml")
        assert result.exit_code == 1
        assert result.stdout == (
            "other.yaml:7: models.x: no chain mistral,openai in envoy.yaml: only mistral would be asked\n"
        )

    def test_chains_are_those_of_the_file_that_is_named(self, directory: Path) -> None:
        chains = TEMPLATE.read_text().replace('exact: "openai,gemini"', 'exact: "gone"')
        (directory / "envoy.yaml").write_text(chains)
        (directory / "other.yaml").write_text(POLICY.replace('"openai/*"', "openai/a, gemini/b"))
        assert tollgate("check", "other.yaml").exit_code == 0
        result = tollgate("check", "other.yaml", "--envoy", "envoy.yaml")
        assert result.exit_code == 1
        assert "no chain openai,gemini" in result.stdout

    def test_of_no_file(self) -> None:
        result = tollgate("check", "none.yaml")
        assert result.exit_code == 1
        assert result.stdout == "none.yaml: the file cannot be read: No such file or directory\n"

    def test_adds_what_envoy_says(self, envoy_problems: list[str]) -> None:
        envoy_problems.append("no such cluster")
        result = tollgate("check", "--envoy", "envoy.yaml")
        assert result.exit_code == 1
        assert result.stdout == "envoy.yaml: no such cluster\n"

    def test_says_when_there_is_no_envoy_to_ask(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def problems(path: Path) -> list[str]:
            raise ImportError

        monkeypatch.setattr("extproc.local.envoy_check.problems", problems)
        (directory / "policy.yaml").write_text(POLICY.replace('"openai/*"', "mistral/a, openai/b"))
        result = tollgate("check")
        assert result.exit_code == 0
        assert "not checked" in result.stderr


def test_check_asks_the_real_envoy(directory: Path) -> None:
    (directory / "envoy.yaml").write_text("static_resources: {listeners: [{nme: x}]}")
    result = tollgate("check", "--envoy", "envoy.yaml")
    assert result.exit_code == 1
    assert "envoy.yaml" in result.stdout
    assert "nme" in result.stdout


# The command as a process ---------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "extproc"]


def test_ship_ships_until_sigterm_and_then_what_is_there(directory: Path) -> None:
    journal = Journal(directory / ".tollgate" / "journal", max_bytes=MIB, clock=lambda: 1)
    store = directory / ".tollgate" / "usage.duckdb"
    with subprocess.Popen([*COMMAND, "ship"]) as shipper:
        journal.append(usage_record("a"))
        while not shown():
            assert shipper.poll() is None
        journal.append(usage_record("b"))
        journal.close()
        shipper.send_signal(signal.SIGTERM)
        assert shipper.wait() == 0
    assert shown() == ["a", "b"]
    assert store.exists()
    assert [path.name for path in (directory / ".tollgate" / "journal").iterdir()] == ["shipper.lock"]


def shown() -> list[str]:
    result = subprocess.run([*COMMAND, "usage", "--json"], capture_output=True, text=True, check=False)
    return [record["request_id"] for record in json.loads(result.stdout)] if result.returncode == 0 else []


def test_a_second_shipper_says_so(directory: Path) -> None:
    shipper = Shipper(directory / ".tollgate" / "journal", DuckDbSink(directory / "usage.duckdb"))
    result = subprocess.run([*COMMAND, "ship"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: the usage journal in .tollgate/journal is being shipped")
    shipper.close()


def test_a_reader_that_goes_away_is_no_error(directory: Path) -> None:
    (directory / ".tollgate").mkdir()
    rows = [UsageRow(usage_record(f"r{number}")) for number in range(1000)]
    assert sum(len(encode(row)) for row in rows) > 64 * 1024  # more than a pipe takes
    DuckDbSink(directory / ".tollgate" / "usage.duckdb").write("s", 1, rows)
    with subprocess.Popen([*COMMAND, "usage", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as usage:
        assert usage.stdout is not None
        assert usage.stderr is not None
        usage.stdout.read(1)
        usage.stdout.close()
        assert usage.stderr.read() == b""


@pytest.mark.parametrize("setting", ["TOLLGATE_HEALTH_PORT=x", "REDIS_URL=http://x"])
@pytest.mark.parametrize("command", ["serve", "ship", "usage", "budgets", "check"])
def test_a_setting_that_cannot_be_used_is_named(command: str, setting: str) -> None:
    name, value = setting.split("=")
    fails_in_one_line(tollgate(command, env={name: value}), name)


def test_the_stacks_environment_is_beneath_the_real_one(directory: Path) -> None:
    (directory / "stack.env").write_text("A=file\n\n# comment\nB=x=y\nC=file\n")
    env = {"TOLLGATE_STATE_DIR": str(directory), "A": "real"}
    assert cli.stack_environment(env) == {"A": "real", "B": "x=y", "C": "file", "TOLLGATE_STATE_DIR": str(directory)}
    assert cli.stack_environment({"TOLLGATE_STATE_DIR": str(directory / "none"), "A": "1"})["A"] == "1"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_taken_health_port_ends_the_processor(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [*COMMAND, "serve", "--workers", workers]
        env = os.environ | {"TOLLGATE_HEALTH_PORT": port, "TOLLGATE_METRICS_PORT": "0"}
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == f"Error: TOLLGATE_HEALTH_PORT {port} cannot be listened on: it may be taken"
