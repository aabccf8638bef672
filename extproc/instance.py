"""Who this instance is: a name that lives exactly as long as the state directory, and with it the usage journal.

An instance that starts again with its disk is the same one, and ships its own journal; one that lost it is another.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def instance_of(state_dir: Path) -> str:
    """The instance's name, made up by the first of its processes that asks. Raises OSError."""
    path = state_dir / "instance"
    state_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        name = secrets.token_hex(8)
        draft = path.with_name(f"instance.{name}")
        draft.write_text(name)
        with suppress(FileExistsError):  # another process was faster
            os.link(draft, path)
        draft.unlink()
    return path.read_text()
