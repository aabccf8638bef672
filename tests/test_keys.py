"""The key store against a real HTTP server on loopback, with a clock of its own."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import json
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from extproc.errors import Unavailable
from extproc.identity import Identity, UnknownKey
from extproc.keys import KeyStore, fresh_for_s
from extproc.limits import (
    KEYS_REFETCH_INTERVAL_S,
    MAX_KEY_SET_BYTES,
    MAX_KEYS_BACKOFF_S,
    MAX_KEYS_MAX_AGE_S,
    MIN_KEYS_MAX_AGE_S,
)
from extproc.local.http import Request, Response, Server, serve
from extproc.local.issuer import DevIssuer
from extproc.records import IdentityRules

ISSUER, OTHER = "https://dev.tollgate.local", "https://accounts.google.com"
MAX_AGE_S, MAX_STALE_S = 1_000, 500
AUDIENCE, EMAIL, NOW_S = "https://tollgate.example", "alice@example.com", 1_800_000_000


@cache
def private_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key for each name, made once for all tests."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def certificate(key: rsa.RSAPrivateKey) -> str:
    """A self-signed certificate, as Google publishes them."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "federated-signon.example")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, day, day + datetime.timedelta(days=16))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


class KeyServer:
    """A key server whose answer can be changed, made to wait, or to fail."""

    def __init__(self) -> None:
        self.fetches = 0
        self.status = 200
        self.headers: tuple[tuple[str, str], ...] = (("cache-control", f"public, max-age={MAX_AGE_S}, no-transform"),)
        self.body = b""
        self.gate = asyncio.Event()
        self.gate.set()
        self.publish(k1=pem(private_key("k1")))

    def publish(self, **pems: str) -> None:
        self.body = json.dumps(pems).encode()

    async def answer(self, request: Request) -> Response:
        self.fetches += 1
        await self.gate.wait()
        if request.target == "/elsewhere":
            return Response(200, self.headers, self.body)
        return Response(self.status, self.headers, self.body)


class Rig:
    """A store, its key server, and the store's clock."""

    def __init__(self, server: Server, source: KeyServer) -> None:
        self.now_s = 0.0
        self.source = source
        self.url = f"http://127.0.0.1:{server.port}/certs"
        self.store = KeyStore({ISSUER: self.url}, MAX_STALE_S, clock_s=lambda: self.now_s)

    async def at(self, now_s: float) -> int:
        """Let it be `now_s`, do what the background task does every second, and say how many fetches there were."""
        self.now_s = now_s
        await self.store.refresh_due()
        return self.source.fetches

    def knows(self, kid: str) -> bool:
        return self.store.verifier(ISSUER, kid) is not None


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    source = KeyServer()
    server = await serve(source.answer)
    rig = Rig(server, source)
    yield rig
    await rig.store.close()
    await server.close()


async def test_certificates_and_public_keys(rig: Rig) -> None:
    rig.source.publish(k1=certificate(private_key("k1")), k2=pem(private_key("k2")))
    await rig.at(0)
    assert rig.knows("k1")
    assert rig.knows("k2")
    assert not rig.knows("k3")
    signer = DevIssuer(private_key("k1"))
    signed, _, signature = signer.mint(EMAIL, AUDIENCE, 60, NOW_S).rpartition(".")
    verifier = rig.store.verifier(ISSUER, "k1")
    assert verifier is not None
    decoded = urlsafe_b64decode(signature + "==")
    assert verifier.verify(signed.encode(), decoded)
    assert not verifier.verify(b"x" + signed.encode(), decoded)


async def test_keys_of_one_issuer_are_not_those_of_another(rig: Rig) -> None:
    await rig.at(0)
    assert rig.store.verifier(OTHER, "k1") is None
    await rig.store.refresh(OTHER)  # unknown to the settings: nothing to fetch
    assert rig.source.fetches == 1


async def test_unavailable_before_the_first_fetch(rig: Rig) -> None:
    assert not rig.store.ready()
    with pytest.raises(Unavailable) as refusal:
        rig.knows("k1")
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, KEYS_REFETCH_INTERVAL_S)
    await rig.at(0)
    assert rig.store.ready()


async def test_max_age_decides_when_to_fetch_again(rig: Rig) -> None:
    assert await rig.at(0) == 1
    assert await rig.at(MAX_AGE_S * 0.89) == 1
    assert await rig.at(MAX_AGE_S * 0.9) == 2
    assert await rig.at(MAX_AGE_S * 0.9 + MAX_AGE_S * 0.89) == 2


@pytest.mark.parametrize(
    ("cache_control", "age", "fresh_s"),
    [
        ("max-age=1000", "", 1000),
        ("Public,Max-Age=1000, must-revalidate", "", 1000),
        ("max-age=1000", "300", 700),
        ("max-age=1000", "x", 1000),
        ("max-age=1000", "2000", MIN_KEYS_MAX_AGE_S),
        ("max-age=0", "", MIN_KEYS_MAX_AGE_S),
        ("max-age=999999999", "", MAX_KEYS_MAX_AGE_S),
        ("max-age=99999999999999999999", "", MIN_KEYS_MAX_AGE_S),
        ("s-maxage=1000", "", MIN_KEYS_MAX_AGE_S),
        ("x-max-age=1000", "", MIN_KEYS_MAX_AGE_S),
        ("no-store", "", MIN_KEYS_MAX_AGE_S),
        ("", "", MIN_KEYS_MAX_AGE_S),
    ],
    ids=["plain", "list", "age", "bad-age", "old", "zero", "long", "digits", "shared", "other", "no-store", "absent"],
)
def test_freshness(cache_control: str, age: str, fresh_s: int) -> None:
    assert fresh_for_s(cache_control, age) == fresh_s


async def test_key_server_down_serves_stale_for_a_bound_and_then_503(rig: Rig) -> None:
    await rig.at(0)
    rig.source.status = 500
    await rig.at(MAX_AGE_S + MAX_STALE_S - 1)
    assert rig.knows("k1")
    assert rig.store.ready()
    await rig.at(MAX_AGE_S + MAX_STALE_S)
    assert not rig.store.ready()
    with pytest.raises(Unavailable):
        rig.knows("k1")
    rig.source.status = 200
    await rig.at(MAX_AGE_S + MAX_STALE_S + MAX_KEYS_BACKOFF_S)
    assert rig.knows("k1")


async def test_failed_attempts_back_off(rig: Rig) -> None:
    rig.source.status = 500
    attempts = []
    for now_s in range(200):
        before = rig.source.fetches
        if await rig.at(now_s) > before:
            attempts.append(now_s)
    assert attempts == [0, 2, 6, 14, 30, 62, 122, 182]
    rig.source.status = 200
    await rig.at(242)
    assert rig.knows("k1")
    rig.source.status = 500
    first = 242 + MAX_AGE_S * 0.9
    assert await rig.at(first) + 1 == await rig.at(first + 2)  # success starts the series anew


async def test_connection_refused_is_an_attempt_that_failed(rig: Rig) -> None:
    unused = await serve(rig.source.answer)
    await unused.close()
    store = KeyStore({ISSUER: f"http://127.0.0.1:{unused.port}/certs"}, MAX_STALE_S, clock_s=lambda: 0.0)
    await store.refresh_due()
    assert not store.ready()


async def test_one_issuer_down_leaves_the_others_in_use(rig: Rig) -> None:
    failing = KeyServer()
    failing.status = 503
    server = await serve(failing.answer)
    urls = {OTHER: f"http://127.0.0.1:{server.port}/", ISSUER: rig.url}
    store = KeyStore(urls, MAX_STALE_S, clock_s=lambda: 0.0)
    await store.refresh_due()
    await server.close()
    assert store.ready()
    assert store.verifier(ISSUER, "k1") is not None
    with pytest.raises(Unavailable):
        store.verifier(OTHER, "k1")


BAD_SETS = {
    "not-json": (b"<html>", "not a JSON object"),
    "list": (b"[]", "not a JSON object"),
    "jwks": (b'{"keys":[]}', "not a JSON object of PEM"),
    "empty": (b"{}", "no usable key"),
    "not-pem": (b'{"k1":"not a key"}', "no usable key"),
    "not-utf8": (b'{"k1":"\xff"}', "not a JSON object"),
}


@pytest.mark.parametrize(("body", "says"), BAD_SETS.values(), ids=BAD_SETS.keys())
async def test_a_bad_key_set_leaves_the_old_one_in_use(
    rig: Rig, body: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.at(0)
    rig.source.body = body
    assert await rig.at(MAX_AGE_S) == 2
    assert rig.knows("k1")
    assert says in caplog.text


@pytest.mark.parametrize(("size", "usable"), [(MAX_KEY_SET_BYTES, True), (MAX_KEY_SET_BYTES + 1, False)])
async def test_the_size_of_a_key_set_is_bounded(rig: Rig, size: int, usable: bool) -> None:
    rig.source.body = rig.source.body.ljust(size)
    await rig.at(0)
    assert rig.store.ready() is usable


async def test_a_compressed_answer_is_not_expanded(rig: Rig) -> None:
    rig.source.headers += (("content-encoding", "gzip"),)
    rig.source.body = gzip.compress(rig.source.body)
    await rig.at(0)
    assert not rig.store.ready()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(rig: Rig, status: int) -> None:
    rig.source.status = status
    rig.source.headers += (("location", "/elsewhere"),)
    assert await rig.at(0) == 1
    assert not rig.store.ready()


async def test_only_rsa_keys_of_2048_bits_and_more_are_used(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    elliptic, edwards = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    rig.source.publish(
        k1=pem(private_key("k1")), weak=pem(private_key("weak", 1024)), ec=pem(elliptic), ed=pem(edwards), junk="x"
    )
    await rig.at(0)
    assert [rig.knows(kid) for kid in ("k1", "weak", "ec", "ed", "junk")] == [True, False, False, False, False]
    assert caplog.text.count("not used") == 4


async def test_rotation_adds_and_withdraws_keys(rig: Rig) -> None:
    rig.source.publish(k1=pem(private_key("k1")), k2=pem(private_key("k2")))
    await rig.at(0)
    kept = rig.store.verifier(ISSUER, "k2")
    rig.source.publish(k2=pem(private_key("k2")), k3=pem(private_key("k3")))
    await rig.at(MAX_AGE_S)
    assert [rig.knows(kid) for kid in ("k1", "k2", "k3")] == [False, True, True]
    assert rig.store.verifier(ISSUER, "k2") is kept  # or every remembered token would be verified again


async def test_a_key_replaced_under_its_kid_is_another_verifier(rig: Rig) -> None:
    await rig.at(0)
    first = rig.store.verifier(ISSUER, "k1")
    rig.source.publish(k1=pem(private_key("k2")))
    await rig.at(MAX_AGE_S)
    assert rig.store.verifier(ISSUER, "k1") is not first


async def test_refresh_for_an_unknown_kid_is_rate_limited(rig: Rig) -> None:
    await rig.at(0)
    rig.now_s = KEYS_REFETCH_INTERVAL_S - 1
    await rig.store.refresh(ISSUER)
    assert rig.source.fetches == 1
    rig.now_s = KEYS_REFETCH_INTERVAL_S
    for _ in range(3):
        await rig.store.refresh(ISSUER)
    assert rig.source.fetches == 2
    rig.source.status = 500  # failures count as well
    rig.now_s = 2 * KEYS_REFETCH_INTERVAL_S
    for _ in range(3):
        await rig.store.refresh(ISSUER)
    assert rig.source.fetches == 3


async def test_callers_share_one_fetch_and_outlive_each_other(rig: Rig) -> None:
    await rig.at(0)
    rig.now_s = KEYS_REFETCH_INTERVAL_S
    rig.source.gate.clear()
    first, second = (asyncio.create_task(rig.store.refresh(ISSUER)) for _ in range(2))
    while rig.source.fetches < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    third = asyncio.create_task(rig.store.refresh(ISSUER))
    await asyncio.sleep(0)
    assert not third.done()
    first.cancel()
    rig.source.publish(k2=pem(private_key("k2")))
    rig.source.gate.set()
    await asyncio.gather(second, third)
    assert first.cancelled()
    assert rig.knows("k2")
    assert rig.source.fetches == 2


async def test_a_rotated_key_is_accepted_after_one_fetch(rig: Rig) -> None:
    """What a caller of `Identity` does: UnknownKey, refresh, again."""
    old, new = DevIssuer(private_key("k1")), DevIssuer(private_key("k2"))
    rig.source.publish(**old.certificates())
    await rig.at(0)
    rules = IdentityRules(audiences=(AUDIENCE,), issuers=(ISSUER,), allow=("*",))
    identity = Identity(rules, rig.store, lambda: NOW_S)
    old_bearer, new_bearer = ([f"Bearer {one.mint(EMAIL, AUDIENCE, 600, NOW_S)}"] for one in (old, new))
    identity.principal(old_bearer, None)
    rig.source.publish(**new.certificates())
    rig.now_s = KEYS_REFETCH_INTERVAL_S
    with pytest.raises(UnknownKey) as unknown:
        identity.principal(new_bearer, None)
    await rig.store.refresh(unknown.value.issuer)
    assert identity.principal(new_bearer, None).email == EMAIL
    with pytest.raises(UnknownKey):  # remembered, but its key was withdrawn
        identity.principal(old_bearer, None)
    rig.now_s = 2 * (MAX_AGE_S + MAX_STALE_S)
    with pytest.raises(Unavailable):
        identity.principal(new_bearer, None)


async def test_the_background_task_fetches_until_it_is_closed(rig: Rig) -> None:
    rig.store.start()
    while not rig.store.ready():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await rig.store.close()
    assert rig.knows("k1")


async def test_close_while_a_fetch_hangs(rig: Rig) -> None:
    rig.source.gate.clear()
    rig.store.start()
    while not rig.source.fetches:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await rig.store.close()
    rig.source.gate.set()
    assert not rig.store.ready()
