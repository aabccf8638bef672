"""`python -m bench.rivals` installs the other gateways into .bench/, each into an environment of its own.

Each is optional: where one does not install, the rest of the bench goes on and its report gives the reason.
Versions are pinned; what they depend on is what was newest on a day.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).parent.parent / ".bench"
NEWEST = "2026-11-20"
_ADDRESS = re.compile(r"\S+://\S+")  # the report is for others, who have other mirrors
_UV = Path(sys.prefix) / "bin" / "uv"


@dataclass(frozen=True, slots=True)
class Rival:
    """One gateway: its package, and the pattern of a file that is there once it is installed.

    `overrides`: versions of what the package depends on, whatever it says itself; an empty one stands for any.
    """

    name: str
    registry: str  # "pypi" or "npm"
    package: str
    version: str
    proof: str
    overrides: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return HOME / self.name.lower()

    def lacking(self) -> str | None:
        """Why it cannot run, or None."""
        reason = self.home / "failed"
        if reason.exists():
            return f"does not install: {reason.read_text().strip()}"
        return None if any(self.home.glob(self.proof)) else "not installed: make bench-rivals"

    def install(self) -> None:
        """Raises CalledProcessError, with what the installer said."""
        if self.registry == "npm":
            self._install_from_npm()
        else:
            self._install_from_pypi()

    def _install_from_npm(self) -> None:
        manifest = {"private": True, "dependencies": {self.package: self.version}, "overrides": self.overrides}
        (self.home / "package.json").write_text(json.dumps(manifest))
        self._run("npm", "install", "--prefix", str(self.home), f"--before={NEWEST}", *_QUIET_NPM)

    def _install_from_pypi(self) -> None:
        overrides = self.home / "overrides.txt"
        pins = (f"{name}=={version}" if version else name for name, version in self.overrides.items())
        overrides.write_text("\n".join(pins))
        self._run(str(_UV), "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(self.home))
        self._run(
            *(str(_UV), "pip", "install", "--quiet", "--python", str(self.home / "bin" / "python")),
            *("--overrides", str(overrides), *([] if self.overrides else ["--exclude-newer", NEWEST])),
            f"{self.package}=={self.version}",
        )

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


_QUIET_NPM = ("--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")

RIVALS = {
    rival.name: rival
    for rival in (
        Rival(
            *("LiteLLM", "pypi", "litellm[proxy]", "1.109.1", "bin/litellm"),
            # Bounds that not every mirror of the index has reached.
            {"litellm-proxy-extras": "0.4.110", "certifi": ""},
        ),
        # The wheel of the Python client holds the whole gateway, HTTP server included.
        Rival("TensorZero", "pypi", "tensorzero", "2026.6.0", "lib/*/site-packages/tensorzero/*.so"),
        Rival(
            *("Portkey", "npm", "@portkey-ai/gateway", "1.15.2"),
            "node_modules/@portkey-ai/gateway/build/start-server.js",
            # With 1.14 and later its streams fail: "TypeError: immutable" (Portkey-AI/gateway, issue 1389).
            {"@hono/node-server": "1.13.8"},
        ),
    )
}


def install_all() -> None:
    """Those that are not there yet. Says what it does, and goes on where one fails."""
    for rival in RIVALS.values():
        failed = rival.home / "failed"
        failed.unlink(missing_ok=True)
        if rival.lacking() is None:
            continue
        print(f"installing {rival.package} {rival.version}", file=sys.stderr, flush=True)
        rival.home.mkdir(parents=True, exist_ok=True)
        try:
            rival.install()
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            failed.write_text(_ADDRESS.sub("(an address)", " ".join(said.split()))[-500:])
            print(f"{rival.name} does not install: {said[-2000:]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    install_all()
