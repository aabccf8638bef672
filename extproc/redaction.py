"""Takes secrets out of what leaves the gateway."""

from __future__ import annotations

import re
from collections.abc import Callable

REDACTED = b"[redacted]"


class Redactor:
    """Replaces every secret value by `[redacted]`, whatever the values are at that moment."""

    def __init__(self, values: Callable[[], tuple[str, ...]]) -> None:
        """`values` gives the secrets in use: `Secrets.values`."""
        self._values = values
        self._compiled_for: tuple[str, ...] = ()
        self._pattern: re.Pattern[bytes] | None = None

    def __repr__(self) -> str:
        return "Redactor()"

    def redact(self, data: bytes) -> bytes:
        """`data` without the secrets. A whole body at once: a secret cut in two by chunks is not seen."""
        values = self._values()
        if values != self._compiled_for:
            self._pattern, self._compiled_for = _pattern_of(values), values
        return data if self._pattern is None else self._pattern.sub(REDACTED, data)


def _pattern_of(values: tuple[str, ...]) -> re.Pattern[bytes] | None:
    # The longest first, or a secret that begins with another one would keep its end.
    secrets = sorted(filter(None, values), key=len, reverse=True)
    return re.compile(b"|".join(re.escape(secret.encode()) for secret in secrets)) if secrets else None
