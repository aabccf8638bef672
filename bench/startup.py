"""From the start of an instance to ready, as `tollgate up-manifest` prints it, and where the time went."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from extproc.local.valkey import free_port

STEPS = ("imports", "tokenizers", "prices", "Redis")
_PATIENCE_S = 60.0


async def measure() -> dict[str, float]:
    """Seconds: `ready` for all, `processor` and `Envoy` with their probes, and each of STEPS. Raises OSError."""
    with tempfile.TemporaryDirectory(prefix="tg") as folder:
        env = {"PATH": os.environ["PATH"], "PORT": str(free_port()), "TOLLGATE_STATE_DIR": str(Path(folder) / "state")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "extproc", "up-manifest"),
            cwd=folder,
            env=env,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        said: list[str] = []
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while not said or not said[-1].startswith("ready "):
                    line = await process.stdout.readline()
                    if not line:
                        raise OSError(f"up-manifest ended: {' '.join(said)}")
                    said.append(line.decode())
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.communicate()
    return _figures("".join(said))


def _figures(said: str) -> dict[str, float]:
    def of(pattern: str) -> float:
        found = re.search(pattern, said)
        if found is None:
            raise OSError(f"up-manifest did not say {pattern!r}")
        return float(found[1])

    took = {step: of(rf"\b{step} ([\d.]+)") for step in STEPS}
    envoy_s = of(r"envoy: from [\d.]+ s to ([\d.]+) s") - of(r"envoy: from ([\d.]+) s")
    processor_s = of(r"extproc: from [\d.]+ s to ([\d.]+) s")
    return {"ready": of(r"start to ready: ([\d.]+) s"), "processor": processor_s, "Envoy": envoy_s, **took}
