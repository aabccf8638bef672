"""A Cloud Run manifest, read: the Knative v1 Service of one instance's containers, as far as running them goes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

_DEPENDENCIES = "run.googleapis.com/container-dependencies"


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked, where, and how often: Cloud Run's defaults where the manifest is silent."""

    kind: str  # grpc, httpGet or tcpSocket
    port: int
    what: str  # the gRPC service, or the path
    initial_delay_s: int
    period_s: int
    timeout_s: int
    failures: int  # in a row that are one too many


@dataclass(frozen=True, slots=True)
class Container:
    """One container. `command` and `arguments` replace the image's, where they are not empty."""

    name: str
    image: str  # its name alone, without place and tag
    command: tuple[str, ...]
    arguments: tuple[str, ...]
    env: Mapping[str, str]
    port: int | None  # where callers come in, of the one that takes them
    mounts: Mapping[str, str]  # volumes by the path at which they are seen
    startup: Probe | None
    liveness: Probe | None
    after: tuple[str, ...]  # the containers that have to be ready before it starts


@dataclass(frozen=True, slots=True)
class Manifest:
    """A service. `secrets` are the volumes that hold one: of each, the secret's name and the file's."""

    name: str
    containers: tuple[Container, ...]
    volumes: tuple[str, ...]
    secrets: Mapping[str, Mapping[str, str]]


def read(path: Path, values: Mapping[str, str]) -> Manifest:
    """`values` fill in `${NAME}`, and `local` what they lack. Raises OSError, and KeyError for what is no manifest."""
    filled = Template(path.read_text()).substitute(defaultdict(lambda: "local", values))
    service = yaml.safe_load(filled)
    template = service["spec"]["template"]
    after = json.loads(template["metadata"]["annotations"].get(_DEPENDENCIES, "{}"))
    containers = tuple(_container(one, after.get(one["name"], ())) for one in template["spec"]["containers"])
    volumes = template["spec"].get("volumes", [])
    secrets = {one["name"]: _files(one["secret"]) for one in volumes if "secret" in one}
    return Manifest(service["metadata"]["name"], containers, tuple(one["name"] for one in volumes), secrets)


def _container(one: Mapping[str, Any], after: tuple[str, ...]) -> Container:
    return Container(
        name=one["name"],
        image=one["image"].rpartition("/")[2].partition(":")[0],
        command=tuple(one.get("command", ())),
        arguments=tuple(one.get("args", ())),
        env={variable["name"]: variable["value"] for variable in one.get("env", [])},
        port=one["ports"][0]["containerPort"] if "ports" in one else None,
        mounts={mount["mountPath"]: mount["name"] for mount in one.get("volumeMounts", [])},
        startup=_probe(one.get("startupProbe")),
        liveness=_probe(one.get("livenessProbe")),
        after=tuple(after),
    )


def _probe(one: Mapping[str, Any] | None) -> Probe | None:
    if one is None:
        return None
    kind = next(kind for kind in ("grpc", "httpGet", "tcpSocket") if kind in one)
    return Probe(
        kind=kind,
        port=one[kind]["port"],
        what=one[kind].get("service" if kind == "grpc" else "path", ""),
        initial_delay_s=one.get("initialDelaySeconds", 0),
        period_s=one.get("periodSeconds", 10),
        timeout_s=one.get("timeoutSeconds", 1),
        failures=one.get("failureThreshold", 3),
    )


def _files(secret: Mapping[str, Any]) -> dict[str, str]:
    return {item["path"]: secret["secretName"] for item in secret["items"]}
