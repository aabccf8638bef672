"""Token counters from the BPE files shipped in `extproc/bpe`. Nothing is ever downloaded.

tiktoken deletes a cached file with a wrong checksum and fetches another, so each file is checked before it looks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from types import MappingProxyType

import tiktoken

from extproc.limits import CACHED_COUNT_CHARS, MAX_CACHED_COUNTS

BPE_DIR = Path(__file__).parent / "bpe"

# Each encoding's file, named as tiktoken's cache names it (the SHA-1 of its URL), and the file's SHA-256.
BPE_FILES = MappingProxyType(
    {
        "o200k_base": (
            "fb374d419588a4632f3f557e76b4b70aebbca790",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
        "cl100k_base": (
            "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    }
)


class EncodingUnusable(Exception):
    """An encoding that is not shipped, or whose file is missing or is not the one that was shipped."""


@cache
def counter(encoding: str) -> Callable[[str], int]:
    """How many tokens a text is in this encoding. Special tokens are counted as the text that they look like.

    Loading takes about a second, once; the counter never raises, whatever the text. Raises EncodingUnusable.
    """
    check_file(encoding, BPE_DIR)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(BPE_DIR)
    encode = tiktoken.get_encoding(encoding).encode_ordinary

    @lru_cache(maxsize=MAX_CACHED_COUNTS)
    def count_short(text: str) -> int:
        return len(encode(text))

    def count(text: str) -> int:
        """Most texts are a word or two of a stream, and most words come again."""
        return count_short(text) if len(text) <= CACHED_COUNT_CHARS else len(encode(text))

    return count


def check_file(encoding: str, folder: Path) -> None:
    """Raises EncodingUnusable unless the folder holds exactly the file that the encoding was tested with."""
    if encoding not in BPE_FILES:
        raise EncodingUnusable(f"encoding {encoding!r} is not shipped; there are {', '.join(BPE_FILES)}")
    name, sha256 = BPE_FILES[encoding]
    try:
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        raise EncodingUnusable(f"{encoding}: {name} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise EncodingUnusable(f"{encoding}: {name} has the SHA-256 {found}, not {sha256}")
