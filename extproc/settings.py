"""One typed settings object, built and checked once from the environment. docs/settings.md describes every field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from extproc.providers import PROVIDERS, Provider, vertex_base_url

PROVIDER_BASE_URLS = {name: provider.base_url for name, provider in PROVIDERS.items() if provider.base_url is not None}

GOOGLE_ISSUER_KEYS = "https://www.googleapis.com/oauth2/v1/certs"  # PEM certificates by kid

TRANSPORTS = ("wire", "grpc")  # the first is the default
LOCAL_STORE = "duckdb"


class SettingsInvalid(Exception):
    """A setting that cannot be used. The message names the variable, never a secret's value."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset of BigQuery."""

    project: str
    name: str

    def __str__(self) -> str:
        return f"{self.project}.{self.name}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are and how long to wait. What callers may do is the policy's, not these settings'.

    `base_urls` has the providers that there is a place for: Azure's and Vertex's only where they are set.
    `secret_versions` are the names of providers' keys in Secret Manager: a key that has one comes from nowhere else.
    """

    policy_path: Path
    redis_url: str
    socket_path: Path
    state_dir: Path
    usage_db_path: Path
    health_port: int = 9091
    metrics_port: int | None = 9464
    otlp_endpoint: str | None = None
    health_host: str = "127.0.0.1"
    envoy_config_path: Path | None = None
    transport: str = TRANSPORTS[0]
    secrets_dir: Path | None = None
    secret_versions: Mapping[str, str] = field(default_factory=dict)
    secrets_refresh_s: int = 3600
    secret_manager_endpoint: str | None = None
    base_urls: Mapping[str, str] = field(default_factory=lambda: dict(PROVIDER_BASE_URLS))
    issuer_keys: Mapping[str, str] = field(default_factory=lambda: {"https://accounts.google.com": GOOGLE_ISSUER_KEYS})
    added_issuers: tuple[str, ...] = ()
    namespace: str = "tollgate"
    lease_tokens: int = 100
    hold_ttl_ms: int = 60_000
    ledger_timeout_ms: int = 1_000
    admission_timeout_ms: int = 3_000
    first_byte_timeout_ms: int = 30_000
    keys_max_stale_s: int = 24 * 3600
    journal_max_mib: int = 512
    drain_timeout_s: int = 8
    usage_store: str = LOCAL_STORE
    bigquery_endpoint: str | None = None
    ship: bool = False
    flush_timeout_s: int = 6

    @property
    def dataset(self) -> Dataset | None:
        """Where usage goes in BigQuery; None where it goes into the local store."""
        if self.usage_store == LOCAL_STORE:
            return None
        return Dataset(*self.usage_store.removeprefix("bigquery://").split("/"))

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Settings:
        """Read `env`; an empty variable counts as not set. Raises SettingsInvalid, naming the variable."""
        state_dir = Path(env.get("TOLLGATE_STATE_DIR") or ".tollgate")
        return cls(
            policy_path=Path(env.get("TOLLGATE_POLICY") or "policy.yaml"),
            redis_url=_redis_url(env.get("REDIS_URL") or "redis://127.0.0.1:6379/0"),
            socket_path=Path(env.get("TOLLGATE_SOCKET") or state_dir / "extproc.sock"),
            state_dir=state_dir,
            usage_db_path=Path(env.get("TOLLGATE_USAGE_DB") or state_dir / "usage.duckdb"),
            health_port=_integer(env, "TOLLGATE_HEALTH_PORT", 9091, 0, 65_535),
            metrics_port=_metrics_port(env),
            otlp_endpoint=_otlp_endpoint(env),
            health_host=_address(env, "TOLLGATE_HEALTH_HOST", "127.0.0.1"),
            envoy_config_path=Path(env["TOLLGATE_ENVOY_CONFIG"]) if env.get("TOLLGATE_ENVOY_CONFIG") else None,
            transport=_choice(env, "TOLLGATE_TRANSPORT", TRANSPORTS),
            secrets_dir=Path(env["TOLLGATE_SECRETS_DIR"]) if env.get("TOLLGATE_SECRETS_DIR") else None,
            secret_versions=_secret_versions(env),
            secrets_refresh_s=_integer(env, "TOLLGATE_SECRETS_REFRESH_S", 3600, 10, 24 * 3600),
            secret_manager_endpoint=_endpoint(env, "TOLLGATE_SECRET_MANAGER_ENDPOINT"),
            base_urls=_base_urls(env),
            issuer_keys={"https://accounts.google.com": GOOGLE_ISSUER_KEYS, **_issuer_keys(env)},
            added_issuers=tuple(_issuer_keys(env)),
            namespace=_namespace(env.get("TOLLGATE_NAMESPACE") or "tollgate"),
            lease_tokens=_integer(env, "TOLLGATE_LEASE_TOKENS", 100, 1, 100_000),
            hold_ttl_ms=_integer(env, "TOLLGATE_HOLD_TTL_MS", 60_000, 500, 3_600_000),
            ledger_timeout_ms=_integer(env, "TOLLGATE_LEDGER_TIMEOUT_MS", 1_000, 50, 60_000),
            admission_timeout_ms=_integer(env, "TOLLGATE_ADMISSION_TIMEOUT_MS", 3_000, 100, 60_000),
            first_byte_timeout_ms=_integer(env, "TOLLGATE_FIRST_BYTE_TIMEOUT_MS", 30_000, 100, 600_000),
            keys_max_stale_s=_integer(env, "TOLLGATE_KEYS_MAX_STALE_S", 24 * 3600, 0, 30 * 24 * 3600),
            journal_max_mib=_integer(env, "TOLLGATE_JOURNAL_MAX_MIB", 512, 1, 1_000_000),
            drain_timeout_s=_integer(env, "TOLLGATE_DRAIN_TIMEOUT_S", 8, 0, 3_600),
            usage_store=_usage_store(env.get("TOLLGATE_USAGE_STORE") or LOCAL_STORE),
            bigquery_endpoint=_bigquery_endpoint(env),
            ship=_choice(env, "TOLLGATE_SHIP", ("0", "1")) == "1",
            flush_timeout_s=_integer(env, "TOLLGATE_FLUSH_TIMEOUT_S", 6, 0, 600),
        )


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise SettingsInvalid(f"{name} must be a whole number from {low} to {high}")
    return int(text)


def _address(env: Mapping[str, str], name: str, default: str) -> str:
    value = env.get(name) or default
    try:
        return str(ip_address(value))
    except ValueError:
        raise SettingsInvalid(f"{name} must be an IP address") from None


def _metrics_port(env: Mapping[str, str]) -> int | None:
    name = "TOLLGATE_METRICS_PORT"
    return None if env.get(name) == "off" else _integer(env, name, 9464, 0, 65_535)


def _otlp_endpoint(env: Mapping[str, str]) -> str | None:
    """Only whether there is one matters here: OpenTelemetry's SDK reads the variable itself."""
    name = "OTEL_EXPORTER_OTLP_ENDPOINT"
    return _base_url(name, env[name]) if env.get(name) else None


def _choice(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = env.get(name) or choices[0]
    if value not in choices:
        raise SettingsInvalid(f"{name} must be one of {', '.join(choices)}")
    return value


def _usage_store(text: str) -> str:
    # A project's id, with the domain that some begin with, and what BigQuery lets a dataset be called.
    if text != LOCAL_STORE and not re.fullmatch(r"bigquery://[a-z][a-z0-9.:-]{0,99}/[A-Za-z0-9_]{1,1024}", text):
        raise SettingsInvalid(f"TOLLGATE_USAGE_STORE must be {LOCAL_STORE} or bigquery://PROJECT/DATASET")
    return text


def _bigquery_endpoint(env: Mapping[str, str]) -> str | None:
    name = "TOLLGATE_BIGQUERY_ENDPOINT"
    return _base_url(name, env[name]) if env.get(name) else None


def _base_urls(env: Mapping[str, str]) -> dict[str, str]:
    """Of the providers that have one: as set, else as published, else made from Vertex's project and location."""
    project = _segment(env, "TOLLGATE_VERTEX_PROJECT", "[a-z0-9][a-z0-9.:-]{0,99}", "")
    location = _segment(env, "TOLLGATE_VERTEX_LOCATION", "[a-z][a-z0-9-]{0,62}", "global")

    def default(provider: Provider) -> str | None:
        if provider.publisher is None:
            return provider.base_url
        return vertex_base_url(provider.publisher, project, location) if project else None

    urls = {name: env.get(one.base_url_variable) or default(one) for name, one in PROVIDERS.items()}
    return {name: _base_url(PROVIDERS[name].base_url_variable, url) for name, url in urls.items() if url is not None}


def _segment(env: Mapping[str, str], name: str, form: str, default: str) -> str:
    """Part of a path and of a host: whatever else is in it could lead elsewhere."""
    value = env.get(name) or default
    if value and not re.fullmatch(form, value):
        raise SettingsInvalid(f"{name} must be an identifier of Google Cloud's")
    return value


def _base_url(name: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        plain = False
    if not plain or parts.query or parts.fragment or parts.username:
        raise SettingsInvalid(f"{name} must be a plain http:// or https:// URL")
    return url.rstrip("/")


def _secret_versions(env: Mapping[str, str]) -> dict[str, str]:
    """By provider. Without a version it is the latest one."""
    names = {name: env.get(provider.secret_variable) for name, provider in PROVIDERS.items()}
    return {name: _secret_version(PROVIDERS[name].secret_variable, text) for name, text in names.items() if text}


def _secret_version(variable: str, text: str) -> str:
    """The text is not repeated: whoever mistakes the variable for the key's own puts the key into it."""
    form = r"(projects/[a-z0-9][a-z0-9.:-]{0,99}/secrets/[A-Za-z0-9_-]{1,255})(/versions/(?:latest|[1-9][0-9]{0,8}))?"
    parts = re.fullmatch(form, text)
    if parts is None:
        raise SettingsInvalid(
            f"{variable} must be projects/PROJECT/secrets/SECRET, alone or with /versions/latest or a version's number"
        )
    return parts[1] + (parts[2] or "/versions/latest")


def _endpoint(env: Mapping[str, str], name: str) -> str | None:
    text = env.get(name) or None
    if text is not None and not re.fullmatch(r"[A-Za-z0-9.-]+:[1-9][0-9]{0,4}", text):
        raise SettingsInvalid(f"{name} must be host:port")
    return text


def _redis_url(url: str) -> str:
    if url.partition(":")[0] not in ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster"):
        raise SettingsInvalid(
            "REDIS_URL must begin with redis://, rediss://, redis+cluster://, rediss+cluster:// or unix://"
        )
    try:
        usable = urlsplit(url).port != 0
    except ValueError:  # a port or an IPv6 address that is none
        usable = False
    if not usable:
        raise SettingsInvalid("REDIS_URL must have a host and a port from 1 to 65535, if it has any")
    return url


def _namespace(text: str) -> str:
    """Redis keeps the keys of one hash tag, the text between braces, in one slot: braces inside would end it."""
    if not re.fullmatch(r"[^{}\s]+", text):
        raise SettingsInvalid("TOLLGATE_NAMESPACE must not have braces or white space")
    return text


def _issuer_keys(env: Mapping[str, str]) -> dict[str, str]:
    """`TOLLGATE_ISSUER_KEYS` is `issuer=url` pairs, separated by white space: issuers besides Google's."""
    pairs: dict[str, str] = {}
    for item in env.get("TOLLGATE_ISSUER_KEYS", "").split():
        issuer, _, url = item.partition("=")
        if not issuer or not url.startswith(("http://", "https://")):
            raise SettingsInvalid("TOLLGATE_ISSUER_KEYS must be issuer=url pairs with http or https URLs")
        pairs[issuer] = url
    return pairs
