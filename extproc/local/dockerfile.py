"""What a Dockerfile makes, as far as running it goes: the last stage's files, environment, user and command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser  # type: ignore[import-untyped]


@dataclass(frozen=True, slots=True)
class Copied:
    """One COPY of a single file or directory. `stage` is where from, or None for the build's own files."""

    source: str
    target: str
    stage: str | None


@dataclass(frozen=True, slots=True)
class Image:
    """An image's last stage. `command` is ENTRYPOINT, `arguments` are CMD, both in the exec form."""

    base: str
    copied: tuple[Copied, ...]
    env: Mapping[str, str]
    directory: str
    user: str
    command: tuple[str, ...]
    arguments: tuple[str, ...]


def read(path: Path) -> Image:
    """Raises OSError, and ValueError for an ENTRYPOINT or a CMD in the shell form, which gets no signals."""
    parser = DockerfileParser(fileobj=BytesIO(path.read_bytes()))
    copied: list[Copied] = []
    env: dict[str, str] = {}
    words: dict[str, tuple[str, ...]] = {}
    directory, user = "/", "0"
    stages = [number for number, step in enumerate(parser.structure) if step["instruction"] == "FROM"]
    for step in parser.structure[stages[-1] :]:
        value = str(step["value"])
        match step["instruction"]:
            case "COPY":
                copied.append(_copied(value, directory))
            case "ENV":
                env |= {name: text for name, _, text in (word.partition("=") for word in shlex.split(value))}
            case "WORKDIR":
                directory = str(PurePosixPath(directory, value))
            case "USER":
                user = value
            case "ENTRYPOINT" | "CMD" as name:
                words[name] = tuple(json.loads(value))
            case _:
                pass
    entrypoint, arguments = words.get("ENTRYPOINT", ()), words.get("CMD", ())
    return Image(str(parser.parent_images[-1]), tuple(copied), env, directory, user, entrypoint, arguments)


def _copied(value: str, directory: str) -> Copied:
    words = value.split()
    stage = next((word.partition("=")[2] for word in words if word.startswith("--from=")), None)
    source, target = (word for word in words if not word.startswith("--"))
    return Copied(source, str(PurePosixPath(directory, target)), stage)
