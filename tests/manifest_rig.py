"""The rig's processor and Envoy, as the manifest and the Dockerfiles define them: TOLLGATE_RIG=manifest.

What surrounds the rig takes the place of a cloud. There is no shipper: it would take the rows that tests look for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from extproc.local import manifest
from extproc.local.container import MANIFEST, Process, build
from extproc.local.up_manifest import POLICY_SECRET

_SET_BY_THE_MANIFEST = {
    *("PATH", "TOLLGATE_POLICY", "TOLLGATE_STATE_DIR", "TOLLGATE_SOCKET"),
    *("TOLLGATE_HEALTH_PORT", "TOLLGATE_METRICS_PORT"),
}


def wanted() -> bool:
    """Whether rigs are to run on the manifest."""
    return os.environ.get("TOLLGATE_RIG") == "manifest"


def containers(
    directory: Path, port: int, admin_port: int, policy: Path, environment: Mapping[str, str], *, own: Mapping[str, str]
) -> tuple[Process, Process]:
    """Envoy's and the processor's, in this order. `environment` is what the rig would give the processor.

    `own` is the part of it that a test asked for: that counts, whatever the manifest sets.
    """
    read = manifest.read(MANIFEST, {})
    named = {name for container in read.containers for name in container.env}
    changes = {name: "" for name in named if name.endswith("_SECRET")}
    changes |= {"TOLLGATE_USAGE_STORE": "", "TOLLGATE_SHIP": "0", "ENVOY_ADMIN_PORT": str(admin_port)}
    changes |= {name: value for name, value in environment.items() if name not in _SET_BY_THE_MANIFEST or name in own}
    by_name = {one.name: one for one in build(read, directory, port, {POLICY_SECRET: policy}, changes)}
    return by_name["envoy"], by_name["extproc"]


def executable(process: Process) -> tuple[str, ...]:
    """Its command, found in its own PATH."""
    found = shutil.which(process.command[0], path=process.env["PATH"])
    assert found is not None, process.command
    return (found, *process.command[1:])
