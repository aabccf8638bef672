"""The development issuer's tokens pass the same code as Google's."""

from __future__ import annotations

import asyncio
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from extproc.errors import Unauthenticated
from extproc.identity import Identity
from extproc.keys import KeyStore, fetch_keys
from extproc.local.issuer import CERTIFICATES_PATH, DEV_ISSUER, KEY_FILE, DevIssuer, serve_certificates
from extproc.records import IdentityRules, Principal

NOW_S = 1_800_000_000.7
AUDIENCE = "https://tollgate.example"
EMAIL = "ranker@my-project.iam.gserviceaccount.com"
RULES = IdentityRules(audiences=(AUDIENCE,), issuers=(DEV_ISSUER,), allow=("*",))


async def test_a_minted_token_verifies_by_the_served_key(tmp_path: Path) -> None:
    issuer = DevIssuer.open(tmp_path)
    server = await serve_certificates(issuer, max_age_s=600)
    keys = KeyStore({DEV_ISSUER: f"http://127.0.0.1:{server.port}{CERTIFICATES_PATH}"}, max_stale_s=0)
    try:
        await keys.refresh_due()
        identity = Identity(RULES, keys, lambda: NOW_S)
        token = issuer.mint(EMAIL, AUDIENCE, 60, NOW_S)
        assert identity.principal([f"Bearer {token}"], None) == Principal(EMAIL, EMAIL, None, None)
        unverified = issuer.mint(EMAIL, AUDIENCE, 60, NOW_S, email_verified=False)
        with pytest.raises(Unauthenticated, match="not verified"):
            identity.principal([f"Bearer {unverified}"], None)
        with pytest.raises(Unauthenticated, match="expired"):
            Identity(RULES, keys, lambda: NOW_S + 70).principal([f"Bearer {token}"], None)
    finally:
        await keys.close()
        await server.close()


async def test_serves_nothing_but_the_public_key(tmp_path: Path) -> None:
    issuer = DevIssuer.open(tmp_path)
    server = await serve_certificates(issuer, max_age_s=600)
    base = f"http://127.0.0.1:{server.port}"
    try:
        fetched = await asyncio.to_thread(fetch_keys, base + CERTIFICATES_PATH)
        assert (fetched.pems, fetched.max_age_s) == (issuer.certificates(), 600)
        assert "PRIVATE" not in "".join(fetched.pems.values())
        missing = await asyncio.to_thread(requests.get, f"{base}/{KEY_FILE}", timeout=5)
        assert missing.status_code == 404
    finally:
        await server.close()


def test_the_key_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    first, second = DevIssuer.open(state_dir), DevIssuer.open(state_dir)
    assert first.certificates() == second.certificates()
    assert [file.name for file in state_dir.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((state_dir / KEY_FILE).stat().st_mode) == 0o600


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        issuers = list(pool.map(DevIssuer.open, [tmp_path] * 4))
    assert len({issuer.kid for issuer in issuers}) == 1


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_text("not a key")
    with pytest.raises(ValueError, match="PEM"):
        DevIssuer.open(tmp_path)
