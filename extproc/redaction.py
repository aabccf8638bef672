"""Takes secrets out of what leaves the gateway."""

from __future__ import annotations

import re
from collections.abc import Callable

REDACTED = b"[redacted]"

# Every chunk comes by here and hardly any has a secret: looked for by their beginnings, since a search for something
# long begins with preparations that take longer than the search.
_BEGINNING_BYTES = 12


class Redactor:
    """Replaces every secret value by `[redacted]`, whatever the values are at that moment."""

    def __init__(self, values: Callable[[], tuple[str, ...]]) -> None:
        """`values` gives the secrets in use: `Secrets.values`."""
        self._values = values
        self._prepared_for: tuple[str, ...] = ()
        self._beginnings: tuple[bytes, ...] = ()
        self._pattern = re.compile(b"")

    def __repr__(self) -> str:
        return "Redactor()"

    def redact(self, data: bytes) -> bytes:
        """`data` without the secrets. A whole body at once: a secret cut in two by chunks is not seen."""
        values = self._values()
        if values != self._prepared_for:
            # The longest first, or a secret that begins with another one would keep its end.
            secrets = [value.encode() for value in sorted(filter(None, values), key=len, reverse=True)]
            self._pattern = re.compile(b"|".join(map(re.escape, secrets)))
            self._beginnings = tuple({secret[:_BEGINNING_BYTES] for secret in secrets})
            self._prepared_for = values
        for beginning in self._beginnings:
            if beginning in data:
                return self._pattern.sub(REDACTED, data)
        return data
