"""Envoy's configuration, rendered for one machine. `envoy/envoy.yaml` stays what ops read and tune."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from extproc.providers import PROVIDERS

TEMPLATE = Path(__file__).resolve().parents[1] / "envoy" / "envoy.yaml"

# In the place of ports that only Envoy's own container knows: its entry point puts them in.
PORT, ADMIN_PORT = "PORT", "ADMIN_PORT"


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are on this machine. `base_urls` are the providers', by the name of their cluster."""

    port: int | str
    admin_port: int | str
    sockets: Sequence[Path]
    base_urls: Mapping[str, str] = field(default_factory=dict)
    trusted_ca: Path | None = None
    host: str = "127.0.0.1"


def render(places: Places, template: Path = TEMPLATE) -> str:
    """The configuration with these addresses and ports. Everything else stays as it is written there.

    Providers without a base URL are left out, with their chains: a name that cannot be resolved here costs time.
    """
    config = yaml.load(template.read_text(), yaml.CSafeLoader)
    config["admin"]["address"] = _socket_address("127.0.0.1", places.admin_port)
    resources = config["static_resources"]
    resources["listeners"][0]["address"] = _socket_address(places.host, places.port)
    secure, plain = _with_and_without_tls(resources["clusters"], places.trusted_ca)
    asked = _providers(resources["clusters"])
    resources["clusters"] = kept = [
        one for one in resources["clusters"] if places.base_urls.keys() >= {*asked[one["name"]]}
    ]
    for host in _virtual_hosts(config):
        host["routes"] = [
            route for route in host["routes"] if _cluster(route) in {None, *(one["name"] for one in kept)}
        ]
    for cluster in kept:
        if cluster["name"] == "extproc":
            cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [_pipe(path) for path in places.sockets]}]
        elif _is_providers(cluster):
            url = urlsplit(places.base_urls[asked[cluster["name"]][0]])
            _point_to(cluster, url, secure if url.scheme == "https" else plain)
    return yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False)


def write(path: Path, sockets: Sequence[Path], base_urls: Mapping[str, str]) -> None:
    """Render for Envoy's container, which listens for everybody on the port that it is given. Whole, or not at all."""
    text = render(Places(PORT, ADMIN_PORT, sockets, base_urls, host="0.0.0.0"))  # noqa: S104
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def in_use(base_urls: Mapping[str, str], env: Mapping[str, str], keys: Collection[str]) -> dict[str, str]:
    """Of the providers with a place, those that are set up: `keys` are read already, or one comes from Secret Manager.

    Vertex AI's need none: they are called with Google's tokens.
    """
    return {
        name: url
        for name, url in base_urls.items()
        if name in keys or env.get(f"{PROVIDERS[name].key_variable}_SECRET") or PROVIDERS[name].publisher is not None
    }


def chains(text: str) -> frozenset[tuple[str, ...]]:
    """The failover chains that a configuration offers: of each, the providers in the order of attempts.

    `text` is one that Envoy takes.
    """
    config = yaml.load(text, yaml.CSafeLoader)
    asked = _providers(config["static_resources"]["clusters"])
    routes = (route for host in _virtual_hosts(config) for route in host["routes"])
    found = (asked.get(_cluster(route) or "", ()) for route in routes)
    return frozenset(tuple(dict.fromkeys(providers)) for providers in found if providers)


def _socket_address(host: str, port: int | str) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _pipe(path: Path) -> dict[str, Any]:
    return {"endpoint": {"address": {"pipe": {"path": str(path)}}}}


def _virtual_hosts(config: dict[str, Any]) -> list[dict[str, Any]]:
    (manager,) = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    hosts: list[dict[str, Any]] = manager["typed_config"]["route_config"]["virtual_hosts"]
    return hosts


def _cluster(route: dict[str, Any]) -> str | None:
    """Where a route leads: to a cluster that it names, or to the one that its header names; None where it answers."""
    action: dict[str, str] = route.get("route", {})
    if "cluster_header" not in action:
        return action.get("cluster")
    wanted = {match["name"]: match["string_match"].get("exact") for match in route["match"].get("headers", [])}
    return wanted.get(action["cluster_header"])


def _providers(clusters: Sequence[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The providers that each cluster asks, in order; none for the processor's."""
    hosts = {cluster["name"]: _hosts(cluster) for cluster in clusters}
    return {
        cluster["name"]: tuple(
            host["metadata"]["filter_metadata"]["tollgate"]["provider"]
            for name in _members(cluster)
            for host in hosts.get(name, [])
            if "metadata" in host
        )
        for cluster in clusters
    }


def _members(cluster: dict[str, Any]) -> list[str]:
    """A chain's clusters, in order; of any other cluster, itself."""
    config = cluster.get("cluster_type", {}).get("typed_config", {})
    return [member["name"] for member in config.get("clusters", [cluster])]


def _hosts(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = cluster.get("load_assignment", {}).get("endpoints", [])
    return [host for group in groups for host in group["lb_endpoints"]]


def _is_providers(cluster: dict[str, Any]) -> bool:
    return any("metadata" in host for host in _hosts(cluster))


def _with_and_without_tls(
    clusters: Sequence[dict[str, Any]], trusted_ca: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file has for a provider over TLS, and for one without it."""
    names = ("transport_socket", "typed_extension_protocol_options")
    forms = [
        {name: cluster[name] for name in names if name in cluster} for cluster in clusters if _is_providers(cluster)
    ]
    secure = copy.deepcopy(next(form for form in forms if "transport_socket" in form))
    if trusted_ca is not None:
        context = secure["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
        context["trusted_ca"] = {"filename": str(trusted_ca)}
    return secure, next(form for form in forms if "transport_socket" not in form)


def _point_to(cluster: dict[str, Any], url: SplitResult, form: dict[str, Any]) -> None:
    (host,) = _hosts(cluster)
    host["endpoint"] = {
        "hostname": url.hostname,
        "address": _socket_address(str(url.hostname), url.port or (443 if url.scheme == "https" else 80)),
    }
    cluster.pop("transport_socket", None)  # and with it ALPN
    cluster.update(form)
