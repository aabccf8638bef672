"""`tollgate up-manifest`: the containers of cloudrun-multicontainer.yaml, as it and the Dockerfiles define them."""

from __future__ import annotations

import asyncio
import compileall
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from extproc.local import manifest
from extproc.local.container import CHECKOUT, MANIFEST, build
from extproc.local.instance import Instance, InstanceFailed
from extproc.local.stack import Stack, StackFailed, run_stack
from extproc.providers import PROVIDERS

POLICY_SECRET = "tollgate-policy"  # noqa: S105 (its name)
_STARTED = re.compile(r"started in [0-9.]+ s: (.*)")


def run(changes: Mapping[str, str]) -> None:
    """Run until Ctrl-C or SIGTERM. `changes` are variables that take the place of the manifest's."""
    run_stack(lambda: ManifestStack(os.environ, changes))


class ManifestStack(Stack):
    """The local stack around the manifest's containers: what is a cloud's there is local here."""

    def __init__(self, env: Mapping[str, str], changes: Mapping[str, str]) -> None:
        super().__init__(env)
        self._changes = changes
        self._instance = Instance((), self._log_path)

    async def run_gateway(self, parts: AsyncExitStack, env: Mapping[str, str], base_urls: Mapping[str, str]) -> None:
        """See `Stack`."""
        # As the image's build does: nothing is compiled at the start, or written.
        compileall.compile_dir(CHECKOUT / "extproc", quiet=1)
        directory = Path(tempfile.mkdtemp(prefix="tg"))
        parts.callback(shutil.rmtree, directory, ignore_errors=True)
        read = manifest.read(MANIFEST, env)
        policy = {POLICY_SECRET: Path(env["TOLLGATE_POLICY"])}
        changes = {**here(read, env), **self._changes}
        try:
            processes = build(read, directory, self._port, policy, changes)
        except ValueError as error:
            raise StackFailed(str(error)) from error
        for process in processes:
            self._log_path(process.name).unlink(missing_ok=True)
        self._instance = Instance(processes, self._log_path)
        parts.push_async_callback(self._instance.stop)
        with _told():
            await self._instance.start()
        self._say_where_the_time_went()

    async def supervise(self, stopping: asyncio.Task[Any]) -> None:
        """See `Stack`."""
        lives = asyncio.ensure_future(self._instance.supervise())
        await asyncio.wait((stopping, lives), return_when=asyncio.FIRST_COMPLETED)
        if lives.done():
            with _told():
                lives.result()
        lives.cancel()
        await asyncio.gather(lives, return_exceptions=True)

    def _say_where_the_time_went(self) -> None:
        one = self._instance
        print(f"start to ready: {max(one.ready_s.values()):.2f} s", flush=True)
        for name, ready_s in sorted(one.ready_s.items(), key=lambda item: item[1]):
            steps = _STARTED.search(self._log_path(name).read_text(errors="replace"))
            own = f", of which {steps[1]}" if steps else ""
            print(f"  {name}: from {one.started_s[name]:.2f} s to {ready_s:.2f} s, with its probe{own}", flush=True)


@contextmanager
def _told() -> Iterator[None]:
    """An instance's failure is the stack's, which is said in one line."""
    try:
        yield
    except InstanceFailed as error:
        raise StackFailed(str(error)) from error


def here(read: manifest.Manifest, env: Mapping[str, str]) -> dict[str, str]:
    """What stands here for what exists only in the cloud: Redis, keys, issuer, providers' places, the usage store."""
    named = {name for container in read.containers for name in container.env}
    changes = {name: "" for name in named if name.endswith("_SECRET")}
    changes |= {"TOLLGATE_USAGE_STORE": "", "TOLLGATE_USAGE_DB": env["TOLLGATE_USAGE_DB"]}
    variables = {"REDIS_URL", "TOLLGATE_ISSUER_KEYS", "TOLLGATE_NAMESPACE"}
    variables |= {one.key_variable for one in PROVIDERS.values()}
    variables |= {one.base_url_variable for one in PROVIDERS.values()}
    return changes | {name: env[name] for name in variables if name in env}
