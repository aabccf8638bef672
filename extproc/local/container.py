"""A container's equivalent on this machine: what its image and the manifest say, with other paths and ports.

An image is a directory of links to what its Dockerfile copies. A volume is a directory. Ports, which in an instance are
nobody else's, are free ones.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from extproc.limits import MAX_UNIX_PATH_BYTES
from extproc.local.dockerfile import Image, read
from extproc.local.envoy_check import envoy_binary
from extproc.local.manifest import Container, Manifest, Probe
from extproc.local.valkey import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
MANIFEST = CHECKOUT / "cloudrun-multicontainer.yaml"

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Process:
    """What is run for a container."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    directory: Path
    startup: Probe | None
    liveness: Probe | None
    after: tuple[str, ...]


def dockerfile(container: Container) -> Path:
    """The Dockerfile of a container's image."""
    return CHECKOUT / f"Dockerfile.{container.image}"


def lay_out(image: Image, root: Path) -> None:
    """Make the image's files, as links: what it copies, and of its base what the tests run in the base's place."""
    if image.base.startswith("envoyproxy/envoy:"):
        _link(root / "usr/local/bin/envoy", Path(envoy_binary()))
    for copied in image.copied:
        # Another stage's is a virtual environment; on this machine it is the one that runs this.
        source = CHECKOUT / copied.source if copied.target != "/app/.venv" else Path(sys.prefix)
        _link(root / copied.target.lstrip("/"), source)
    (root / image.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)


def local_ports(manifest: Manifest, port: int) -> dict[int, int]:
    """Of each port that the manifest names, the one here: `port` where callers come in, free ones for the others."""
    inward = {one.port for one in manifest.containers if one.port is not None}
    named = {int(value) for one in manifest.containers for name, value in one.env.items() if name.endswith("_PORT")}
    return {one: port if one in inward else free_port() for one in sorted(inward | named)}


def build(
    manifest: Manifest, directory: Path, port: int, secrets: Mapping[str, Path], changes: Mapping[str, str]
) -> tuple[Process, ...]:
    """The processes of an instance, its images and volumes laid out in `directory`. `secrets` are files by their names.

    Raises ValueError where the volumes' paths are too long for a socket.
    """
    volumes = {name: directory / "v" / name for name in manifest.volumes}
    if len(os.fsencode(volumes[max(volumes, key=len)] / "extproc-0.sock")) > MAX_UNIX_PATH_BYTES:
        raise ValueError(f"{directory} is too deep for a Unix socket: set TMPDIR to a shorter path")
    for name, path in volumes.items():
        path.mkdir(parents=True)
        for file, secret in manifest.secrets.get(name, {}).items():
            (path / file).symlink_to(secrets[secret])
    ports = local_ports(manifest, port)
    built = []
    for container in manifest.containers:
        image, root = read(dockerfile(container)), directory / "images" / container.name
        lay_out(image, root)
        built.append(process(manifest, container, image, root, volumes=volumes, ports=ports, changes=changes))
    return tuple(built)


def process(
    manifest: Manifest,
    container: Container,
    image: Image,
    root: Path,
    *,
    volumes: Mapping[str, Path],
    ports: Mapping[int, int],
    changes: Mapping[str, str],
) -> Process:
    """A container's process. Its environment is the image's, the manifest's, and Cloud Run's own; then `changes`.

    `changes` are what exists only in the cloud. The container that takes the calls gets those that it has already.
    """
    places = {path: str(volumes[name]) for path, name in container.mounts.items()}
    places |= {one.target: str(root) + one.target for one in image.copied}

    def here(text: str) -> str:
        for path, place in places.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", place, text)
        return text

    own = {**image.env, **container.env}
    env = {name: here(_port(name, value, ports)) for name, value in own.items()}
    if container.port is not None:
        env["PORT"] = str(ports[container.port])
    env |= {"K_SERVICE": manifest.name, "K_REVISION": f"{manifest.name}-local", "K_CONFIGURATION": manifest.name}
    env |= {name: value for name, value in changes.items() if container.port is None or name in own}
    env["PATH"] = _path(own.get("PATH", _DEFAULT_PATH), root)
    words = (*(container.command or image.command), *_arguments(container, image))
    return Process(
        container.name,
        tuple(map(here, words)),
        env,
        root / image.directory.lstrip("/"),
        _moved(container.startup, ports),
        _moved(container.liveness, ports),
        container.after,
    )


def _arguments(container: Container, image: Image) -> tuple[str, ...]:
    """CMD belongs to ENTRYPOINT: whoever replaces that replaces both."""
    return container.arguments or (() if container.command else image.arguments)


def _port(name: str, value: str, ports: Mapping[int, int]) -> str:
    """Also of a port that only the image names: the admin port of Envoy."""
    return str(ports.get(int(value)) or free_port()) if name.endswith("_PORT") else value


def _moved(probe: Probe | None, ports: Mapping[int, int]) -> Probe | None:
    return replace(probe, port=ports[probe.port]) if probe is not None else None


def _path(image_path: str, root: Path) -> str:
    """The image's own directories; then this machine's, for what the base image brings: a shell and its tools."""
    return ":".join([*(f"{root}{part}" for part in image_path.split(":")), os.environ["PATH"]])


def _link(path: Path, to: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
