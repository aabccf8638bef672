"""Every variable: its default, its bounds, and its line in the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from extproc.limits import MAX_WORKERS
from extproc.local.stack import DEFAULT_PORT
from extproc.providers import PROVIDERS, vertex_base_url
from extproc.secrets import variable_of
from extproc.settings import GOOGLE_ISSUER_KEYS, PROVIDER_BASE_URLS, TRANSPORTS, Dataset, Settings, SettingsInvalid

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"

GOOGLE = {"https://accounts.google.com": GOOGLE_ISSUER_KEYS}

SECRET = "projects/my-project/secrets/openai-key"

# What a variable says nothing without.
ALONG = {"TOLLGATE_VERTEX_LOCATION": {"TOLLGATE_VERTEX_PROJECT": "my-project"}}


def vertex(project: str, location: str) -> dict[str, str]:
    return {
        "vertex": vertex_base_url("google", project, location),
        "vertex-anthropic": vertex_base_url("anthropic", project, location),
    }


# Variable to (a value, the field, what becomes of it).
VALUES: dict[str, tuple[str, str, Any]] = {
    "TOLLGATE_POLICY": ("/etc/p.yaml", "policy_path", Path("/etc/p.yaml")),
    "REDIS_URL": ("rediss+cluster://r:1", "redis_url", "rediss+cluster://r:1"),
    "TOLLGATE_SOCKET": ("/run/s", "socket_path", Path("/run/s")),
    "TOLLGATE_STATE_DIR": ("/var/t", "state_dir", Path("/var/t")),
    "TOLLGATE_USAGE_DB": ("/var/u.db", "usage_db_path", Path("/var/u.db")),
    "TOLLGATE_HEALTH_PORT": ("0", "health_port", 0),
    "TOLLGATE_HEALTH_HOST": ("0.0.0.0", "health_host", "0.0.0.0"),
    "TOLLGATE_ENVOY_CONFIG": ("/run/envoy.yaml", "envoy_config_path", Path("/run/envoy.yaml")),
    "TOLLGATE_METRICS_PORT": ("off", "metrics_port", None),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("http://c:4318/", "otlp_endpoint", "http://c:4318"),
    "TOLLGATE_TRANSPORT": ("grpc", "transport", "grpc"),
    "TOLLGATE_SECRETS_DIR": ("/secrets", "secrets_dir", Path("/secrets")),
    **{
        provider.secret_variable: (f"{SECRET}/versions/7", "secret_versions", {name: f"{SECRET}/versions/7"})
        for name, provider in PROVIDERS.items()
    },
    "TOLLGATE_SECRETS_REFRESH_S": ("60", "secrets_refresh_s", 60),
    "TOLLGATE_SECRET_MANAGER_ENDPOINT": ("localhost:1", "secret_manager_endpoint", "localhost:1"),
    **{
        provider.base_url_variable: ("http://o:1/v2/", "base_urls", {**PROVIDER_BASE_URLS, name: "http://o:1/v2"})
        for name, provider in PROVIDERS.items()
    },
    "TOLLGATE_VERTEX_PROJECT": ("my-project", "base_urls", {**PROVIDER_BASE_URLS, **vertex("my-project", "global")}),
    "TOLLGATE_VERTEX_LOCATION": ("eu", "base_urls", {**PROVIDER_BASE_URLS, **vertex("my-project", "eu")}),
    "TOLLGATE_ISSUER_KEYS": (
        "https://i=http://k/certs?a=b  j=https://l",
        "issuer_keys",
        {**GOOGLE, "https://i": "http://k/certs?a=b", "j": "https://l"},
    ),
    "TOLLGATE_NAMESPACE": ("mine", "namespace", "mine"),
    "TOLLGATE_LEASE_TOKENS": ("7", "lease_tokens", 7),
    "TOLLGATE_HOLD_TTL_MS": ("900", "hold_ttl_ms", 900),
    "TOLLGATE_LEDGER_TIMEOUT_MS": ("50", "ledger_timeout_ms", 50),
    "TOLLGATE_ADMISSION_TIMEOUT_MS": ("100", "admission_timeout_ms", 100),
    "TOLLGATE_FIRST_BYTE_TIMEOUT_MS": ("100", "first_byte_timeout_ms", 100),
    "TOLLGATE_KEYS_MAX_STALE_S": ("0", "keys_max_stale_s", 0),
    "TOLLGATE_JOURNAL_MAX_MIB": ("1", "journal_max_mib", 1),
    "TOLLGATE_DRAIN_TIMEOUT_S": ("0", "drain_timeout_s", 0),
    "TOLLGATE_USAGE_STORE": ("bigquery://my-project/llm_usage", "dataset", Dataset("my-project", "llm_usage")),
    "TOLLGATE_BIGQUERY_ENDPOINT": ("http://127.0.0.1:1", "bigquery_endpoint", "http://127.0.0.1:1"),
    "TOLLGATE_SHIP": ("1", "ship", True),
    "TOLLGATE_FLUSH_TIMEOUT_S": ("0", "flush_timeout_s", 0),
}

DEFAULTS = {
    "policy_path": Path("policy.yaml"),
    "redis_url": "redis://127.0.0.1:6379/0",
    "socket_path": Path(".tollgate/extproc.sock"),
    "state_dir": Path(".tollgate"),
    "usage_db_path": Path(".tollgate/usage.duckdb"),
    "health_port": 9091,
    "health_host": "127.0.0.1",
    "envoy_config_path": None,
    "metrics_port": 9464,
    "otlp_endpoint": None,
    "transport": TRANSPORTS[0],
    "secrets_dir": None,
    "secret_versions": {},
    "secrets_refresh_s": 3_600,
    "secret_manager_endpoint": None,
    "base_urls": PROVIDER_BASE_URLS,
    "issuer_keys": GOOGLE,
    "namespace": "tollgate",
    "lease_tokens": 100,
    "hold_ttl_ms": 60_000,
    "ledger_timeout_ms": 1_000,
    "admission_timeout_ms": 3_000,
    "first_byte_timeout_ms": 30_000,
    "keys_max_stale_s": 86_400,
    "journal_max_mib": 512,
    "drain_timeout_s": 8,
    "usage_store": "duckdb",
    "dataset": None,
    "bigquery_endpoint": None,
    "ship": False,
    "flush_timeout_s": 6,
}


class Spy(Mapping[str, str]):
    """An empty environment that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_every_variable_that_is_read_is_tested_here() -> None:
    spy = Spy()
    Settings.from_environment(spy)
    assert spy.asked == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_variable_sets_its_field(name: str) -> None:
    value, field, expected = VALUES[name]
    along = ALONG.get(name, {})
    assert getattr(Settings.from_environment({name: value, **along}), field) == expected
    assert getattr(Settings.from_environment(along), field) != expected


@pytest.mark.parametrize("field", DEFAULTS)
def test_without_variables_or_with_empty_ones_there_are_defaults(field: str) -> None:
    assert getattr(Settings.from_environment({}), field) == DEFAULTS[field]
    assert getattr(Settings.from_environment(dict.fromkeys(VALUES, "")), field) == DEFAULTS[field]


def test_a_base_url_for_vertex_is_taken_in_place_of_project_and_location() -> None:
    env = {"TOLLGATE_VERTEX_PROJECT": "p", "TOLLGATE_VERTEX_LOCATION": "europe-west4", "VERTEX_BASE_URL": "http://v/x"}
    base_urls = Settings.from_environment(env).base_urls
    assert base_urls["vertex"] == "http://v/x"
    assert base_urls["vertex-anthropic"] == vertex_base_url("anthropic", "p", "europe-west4")


def test_what_is_in_the_state_directory_moves_with_it() -> None:
    settings = Settings.from_environment({"TOLLGATE_STATE_DIR": "/var/t"})
    assert settings.socket_path == Path("/var/t/extproc.sock")
    assert settings.usage_db_path == Path("/var/t/usage.duckdb")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (SECRET, f"{SECRET}/versions/latest"),
        (f"{SECRET}/versions/latest", f"{SECRET}/versions/latest"),
        (f"{SECRET}/versions/12", f"{SECRET}/versions/12"),
        ("projects/123456/secrets/A_b-1", "projects/123456/secrets/A_b-1/versions/latest"),
        ("projects/example.com:p/secrets/s", "projects/example.com:p/secrets/s/versions/latest"),
    ],
)
def test_a_secret_without_a_version_is_the_latest(text: str, name: str) -> None:
    assert Settings.from_environment({"GROQ_API_KEY_SECRET": text}).secret_versions == {"groq": name}


def test_added_issuers_are_those_besides_googles() -> None:
    assert Settings.from_environment({}).added_issuers == ()
    assert Settings.from_environment({"TOLLGATE_ISSUER_KEYS": "a=http://b"}).added_issuers == ("a",)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("TOLLGATE_HEALTH_PORT", 0, 65_535),
        ("TOLLGATE_METRICS_PORT", 0, 65_535),
        ("TOLLGATE_SECRETS_REFRESH_S", 10, 86_400),
        ("TOLLGATE_LEASE_TOKENS", 1, 100_000),
        ("TOLLGATE_HOLD_TTL_MS", 500, 3_600_000),
        ("TOLLGATE_LEDGER_TIMEOUT_MS", 50, 60_000),
        ("TOLLGATE_ADMISSION_TIMEOUT_MS", 100, 60_000),
        ("TOLLGATE_FIRST_BYTE_TIMEOUT_MS", 100, 600_000),
        ("TOLLGATE_KEYS_MAX_STALE_S", 0, 2_592_000),
        ("TOLLGATE_JOURNAL_MAX_MIB", 1, 1_000_000),
        ("TOLLGATE_DRAIN_TIMEOUT_S", 0, 3_600),
        ("TOLLGATE_FLUSH_TIMEOUT_S", 0, 600),
    ],
    ids=str,
)
def test_numbers_are_bounded(name: str, low: int, high: int) -> None:
    for value in (low, high):
        Settings.from_environment({name: str(value)})
    for text in (str(low - 1), str(high + 1), "1.5", "x", "0x10", "1_000", " 1000 ", "²", "9" * 5_000, "-1"):
        with pytest.raises(SettingsInvalid, match=f"^{name} must be a whole number from {low} to {high}$"):
            Settings.from_environment({name: text})
    row = rows()[name]
    assert f"{low} to {high}" in row.meaning


UNUSABLE = {
    "REDIS_URL": [
        "http://r",
        "r:6379",
        "/run/redis.sock",
        "redis://r:port",
        "redis://r:65536",
        "rediss://[r",
        "redis://r:0",
    ],
    "TOLLGATE_METRICS_PORT": ["OFF", "none"],
    "OTEL_EXPORTER_OTLP_ENDPOINT": ["collector:4318", "grpc://c", "http://c:0"],
    "TOLLGATE_NAMESPACE": ["{", "a}b", "{}", "a b", " "],
    "TOLLGATE_TRANSPORT": ["GRPC", "http"],
    "TOLLGATE_HEALTH_HOST": ["localhost", "999.0.0.1", "127.0.0.1:9091"],
    "OPENAI_API_KEY_SECRET": [
        "sk-canary-0123456789",
        "openai-key",
        "secrets/openai-key",
        "projects/p/secrets/",
        "projects/P/secrets/s",
        "projects/p/secrets/a/b",
        "projects/p/secrets/s/versions",
        "projects/p/secrets/s/versions/",
        "projects/p/secrets/s/versions/0",
        "projects/p/secrets/s/versions/newest",
        "projects/p/secrets/s/versions/7 ",
        "projects/p/locations/europe-west4/secrets/s",
        "//secretmanager.googleapis.com/projects/p/secrets/s",
    ],
    "TOLLGATE_SECRET_MANAGER_ENDPOINT": ["localhost", "http://localhost:1", "localhost:0", "localhost:", ":1"],
    "TOLLGATE_USAGE_STORE": [
        "bigquery:/p/d",
        "bigquery://p",
        "bigquery://p/",
        "bigquery:///d",
        "bigquery://p/d/t",
        "bigquery://p/my-dataset",
        "bigquery://p?/d",
        "gs://p/d",
    ],
    "TOLLGATE_BIGQUERY_ENDPOINT": ["127.0.0.1:1", "ftp://h", "http://h:0"],
    "TOLLGATE_SHIP": ["yes", "2"],
    "OPENAI_BASE_URL": [
        "api.openai.com",
        "ftp://o",
        "https:///v1",
        "https://o/v1?a=b",
        "https://[o",
        "http://o:0",
        "http://o:99999",
        "https://o#f",
        "https://u:p@o",
    ],
    "TOLLGATE_VERTEX_PROJECT": ["a/b", "..", "Project", "a?b", "a#b", "a%2fb", "a b", "x" * 101],
    "TOLLGATE_VERTEX_LOCATION": ["a/b", "evil.example/", "a.b", "1", "a@b", "x" * 64],
    "TOLLGATE_ISSUER_KEYS": ["https://i", "i=", "=https://k", "i=file:///etc/passwd"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in UNUSABLE.items() for text in texts])
def test_what_cannot_be_used_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(SettingsInvalid, match=name) as raised:
        Settings.from_environment({name: text})
    assert text not in str(raised.value) or text == " "
    assert "\n" not in str(raised.value)


# The documentation ----------------------------------------------------------------------------------------------------


class Row:
    def __init__(self, line: str) -> None:
        self.variable, self.default, self.meaning = (cell.strip() for cell in line.strip().strip("|").split("|"))


def rows() -> dict[str, Row]:
    found = [Row(line) for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    names = [row.variable.strip("`") for row in found]
    assert len(names) == len(set(names))
    return dict(zip(names, found, strict=True))


UNLISTED = {provider.secret_variable for provider in PROVIDERS.values()} - {"OPENAI_API_KEY_SECRET"}  # one for all


def test_every_variable_has_one_row_in_the_documentation() -> None:
    keys = {variable_of(provider) for provider in PROVIDERS}
    assert set(rows()) == (set(VALUES) - UNLISTED) | keys | {"PORT", "TOLLGATE_WORKERS"}


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"TOLLGATE_SOCKET", "TOLLGATE_USAGE_DB"} - UNLISTED))
def test_the_documented_default_is_the_default(name: str) -> None:
    _, field, _ = VALUES[name]
    default = DEFAULTS[field]
    if field == "base_urls":
        defaults = {provider.base_url_variable: provider.base_url for provider in PROVIDERS.values()}
        default = {**defaults, "TOLLGATE_VERTEX_PROJECT": None, "TOLLGATE_VERTEX_LOCATION": "global"}[name]
    default = {"TOLLGATE_USAGE_STORE": DEFAULTS["usage_store"], "TOLLGATE_SHIP": "0"}.get(name, default)
    if default in (None, {}, GOOGLE):
        assert rows()[name].default == "none"
    else:
        assert rows()[name].default == f"`{default}`"


def test_the_documented_port_is_the_local_stacks() -> None:
    assert rows()["PORT"].default == f"`{DEFAULT_PORT}`"


def test_the_documented_workers_are_those_that_there_can_be() -> None:
    assert f"1 to {MAX_WORKERS}" in rows()["TOLLGATE_WORKERS"].meaning
    assert rows()["TOLLGATE_WORKERS"].default == "half of the cores"


def test_every_variable_of_ours_that_the_other_documents_name_exists() -> None:
    root = DOCS.parents[1]
    for path in (root / "README.md", *(root / "docs").glob("**/*.md")):
        for name in re.findall(r"\bTOLLGATE_[A-Z_]+\b", path.read_text()):
            assert name in rows(), f"{path.name}: {name}"
