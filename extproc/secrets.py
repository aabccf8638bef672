"""The providers' keys, behind one interface. No message, `repr` or log line here holds a value."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from extproc.limits import MAX_SECRET_BYTES, MIN_REDACTED_BYTES, SECRET_REREAD_INTERVAL_S
from extproc.providers import PROVIDERS
from extproc.settings import SettingsInvalid

log = logging.getLogger(__name__)

_REFRESH_S = 10.0


class Secrets(Protocol):
    """The providers' keys, as they are now."""

    def key(self, provider: str) -> str | None:
        """The provider's key, or None where it has none. Empty where it needs none and is set up."""

    def values(self) -> tuple[str, ...]:
        """What must not get out: every key in use, and those just replaced, whose answers may still be on their way.

        Not what is too short to be a secret: a server without keys is given `none`, which any text may hold.
        """


class Source(Protocol):
    """One place where keys are kept."""

    def read(self) -> Mapping[str, str]:
        """The keys by provider. May block. Raises SettingsInvalid, naming the variable but never its value."""


def variable_of(provider: str) -> str:
    """The name of the environment variable, or file, of a provider's key."""
    return PROVIDERS[provider].key_variable


class EnvironmentSource:
    """Keys in environment variables: `OPENAI_API_KEY`. An empty one counts as not set."""

    def __init__(self, env: Mapping[str, str], providers: Iterable[str]) -> None:
        self._env = env
        self._providers = tuple(providers)

    def read(self) -> Mapping[str, str]:
        """See `Source`."""
        found = {provider: self._env.get(variable_of(provider)) for provider in self._providers}
        return {provider: _checked(variable_of(provider), value) for provider, value in found.items() if value}


class KeylessSource:
    """The empty key, for each provider that needs none: once its base URL is set, since it may not be there at all."""

    def __init__(self, env: Mapping[str, str], providers: Iterable[str]) -> None:
        self._env = env
        self._providers = tuple(providers)

    def read(self) -> Mapping[str, str]:
        """See `Source`."""
        keyless = (PROVIDERS[name] for name in self._providers if not PROVIDERS[name].needs_key)
        return {provider.name: "" for provider in keyless if self._env.get(provider.base_url_variable)}


class FileSource:
    """Keys in files named like the variables, as a mounted secret has them. A trailing line end is dropped."""

    def __init__(self, directory: Path, providers: Iterable[str]) -> None:
        self._directory = directory
        self._providers = tuple(providers)

    def read(self) -> Mapping[str, str]:
        """See `Source`. An empty file is an error: it may be one that is being written."""
        if not self._directory.is_dir():
            raise SettingsInvalid("TOLLGATE_SECRETS_DIR is not a directory")
        found = {provider: self._read_file(variable_of(provider)) for provider in self._providers}
        return {provider: key for provider, key in found.items() if key is not None}

    def _read_file(self, name: str) -> str | None:
        try:
            with (self._directory / name).open("rb") as file:
                data = file.read(MAX_SECRET_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SettingsInvalid(f"{name}: the file cannot be read: {error.strerror}") from None
        return key_of(name, data)


class SecretStore:
    """`Secrets` from several sources, of which the first that has a key wins; read again in the background."""

    def __init__(self, sources: Sequence[Source], clock_s: Callable[[], float] = time.monotonic) -> None:
        """Reads all sources. Raises SettingsInvalid."""
        self._sources = tuple(sources)
        self._found = [source.read() for source in self._sources]
        self._keys = self._merged()
        self._replaced: dict[str, str] = {}
        self._values = _told_from_text(self._keys.values())
        self._clock_s = clock_s
        self._refused_s = -math.inf
        self._asked = asyncio.Event()
        self._reading = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None

    @classmethod
    def of(
        cls, directory: Path | None, env: Mapping[str, str], providers: Collection[str], *first: Source
    ) -> SecretStore:
        """From `first`, from the files in `directory`, if there is one, and the environment. Raises SettingsInvalid.

        `providers` are those whose keys may be in files and in the environment.
        """
        files = () if directory is None else (FileSource(directory, providers),)
        return cls([*first, *files, EnvironmentSource(env, providers), KeylessSource(env, providers)])

    def __repr__(self) -> str:
        return f"SecretStore({', '.join(sorted(self._keys))})"

    def key(self, provider: str) -> str | None:
        """See `Secrets`."""
        return self._keys.get(provider)

    def values(self) -> tuple[str, ...]:
        """See `Secrets`."""
        return self._values

    def start(self) -> None:
        """Read the sources again every few seconds, until `close`."""
        self._background = asyncio.create_task(self._refresh_forever())

    async def close(self) -> None:
        """Stop reading."""
        if self._background is not None:
            self._background.cancel()
            with suppress(asyncio.CancelledError):
                await self._background

    def refused(self) -> None:
        """A provider did not accept its key: read the sources at once, unless that was done just now."""
        now_s = self._clock_s()
        if now_s >= self._refused_s + SECRET_REREAD_INTERVAL_S:
            self._refused_s = now_s
            self.reread()

    def reread(self) -> None:
        """Have the background task read the sources at once."""
        self._asked.set()

    async def refresh(self) -> None:
        """Read the sources again. What one of them had stays in use while it cannot be read."""
        async with self._reading:  # or what was read first could be the last to be put in use
            await asyncio.to_thread(self._read)
        keys = self._merged()
        self._replaced |= {provider: key for provider, key in self._keys.items() if keys.get(provider) != key}
        self._keys = keys
        self._values = _told_from_text((*keys.values(), *self._replaced.values()))

    async def _refresh_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), _REFRESH_S)
            self._asked.clear()
            await self.refresh()

    def _read(self) -> None:
        for number, source in enumerate(self._sources):
            try:
                self._found[number] = source.read()
            except SettingsInvalid as error:
                log.warning("secrets: the old ones stay in use: %s", error)

    def _merged(self) -> Mapping[str, str]:
        keys: dict[str, str] = {}
        for found in reversed(self._found):
            keys.update(found)
        return keys


class FirstOf:
    """`Secrets` of two stores, of which the first that has a key wins."""

    def __init__(self, first: Secrets, second: Secrets) -> None:
        self._first = first
        self._second = second

    def key(self, provider: str) -> str | None:
        """See `Secrets`."""
        key = self._first.key(provider)
        return self._second.key(provider) if key is None else key

    def values(self) -> tuple[str, ...]:
        """See `Secrets`."""
        return self._first.values() + self._second.values()


def _told_from_text(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(value for value in values if len(value) >= MIN_REDACTED_BYTES)


def key_of(name: str, data: bytes) -> str:
    """The key in a file or a payload, without the line ends that editors and shells leave behind it.

    Raises SettingsInvalid with `name`, and without the value.
    """
    return _checked(name, data.rstrip(b"\r\n").decode("latin-1"))


def _checked(name: str, value: str) -> str:
    """A key is one header value: anything else in it is a mistake, or an attempt to add a header."""
    if len(value) > MAX_SECRET_BYTES or not re.fullmatch(r"[!-~]+", value):
        raise SettingsInvalid(f"{name} must be 1 to {MAX_SECRET_BYTES} printable ASCII characters without white space")
    return value
