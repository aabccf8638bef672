"""Attacks on ID tokens, and the callers that must get through. Keys are real; the key set is a dict."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.auth.crypt import RSAVerifier

from extproc.errors import BadRequest, Forbidden, TollgateError, Unauthenticated, Unavailable
from extproc.identity import Identity, UnknownKey, Verifier
from extproc.limits import (
    MAX_TOKEN_BYTES,
    MAX_TOKEN_LIFETIME_S,
    MAX_USER_CHARS,
    MAX_VERIFIED_TOKENS,
    TOKEN_SKEW_S,
)
from extproc.records import IdentityRules, Principal

NOW_S = 1_800_000_000
GOOGLE = "https://accounts.google.com"
OTHER = "https://dev.tollgate.local"
AUDIENCE = "https://tollgate.example"
RANKER = "ranker@my-project.iam.gserviceaccount.com"
FRONTEND = "frontend@my-project.iam.gserviceaccount.com"
ALICE = "alice@example.com"
RULES = IdentityRules(
    audiences=(AUDIENCE, "https://second.example"),
    issuers=(GOOGLE, OTHER),
    allow=("*@my-project.iam.gserviceaccount.com", "*@example.com"),
    delegates=("frontend@my-project.iam.gserviceaccount.com", ALICE),
    teams=(("search", ("ranker@*", "indexer@*")), ("all", ("*@my-project.*",))),
)
CLAIMS: Mapping[str, Any] = {
    "iss": GOOGLE,
    "aud": AUDIENCE,
    "sub": "1",
    "email": RANKER,
    "email_verified": True,
    "iat": NOW_S,
    "exp": NOW_S + 3600,
}
HEADER: Mapping[str, Any] = {"alg": "RS256", "typ": "JWT", "kid": "google-1"}
ABSENT = object()


@cache
def key(name: str) -> rsa.RSAPrivateKey:
    """One key for each name, made once for all tests."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def verifier_of(name: str) -> Verifier:
    verifier: Verifier = RSAVerifier(key(name).public_key())  # type: ignore[no-untyped-call]
    return verifier


class FakeKeys:
    """A key set in memory that notes every question."""

    def __init__(self) -> None:
        self.keys = {(GOOGLE, "google-1"): verifier_of("google-1"), (OTHER, "other-1"): verifier_of("other-1")}
        self.stale = False
        self.asked: list[tuple[str, str]] = []

    def verifier(self, issuer: str, kid: str) -> Verifier | None:
        self.asked.append((issuer, kid))
        if self.stale:
            raise Unavailable("stale")
        return self.keys.get((issuer, kid))


class CountingVerifier:
    """A verifier that counts how often it is used."""

    def __init__(self, verifier: Verifier) -> None:
        self.uses = 0
        self._verifier = verifier

    def verify(self, message: bytes, signature: bytes) -> bool:
        self.uses += 1
        return self._verifier.verify(message, signature)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def rs256(message: bytes, signer: str = "google-1") -> bytes:
    return key(signer).sign(message, padding.PKCS1v15(), hashes.SHA256())


def changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**base, **changes}.items() if value is not ABSENT}


def seal(header: str, payload: str, sign: Callable[[bytes], bytes] = rs256) -> str:
    """A token of exactly these segments, signed."""
    signed = f"{header}.{payload}"
    return f"{signed}.{b64(sign(signed.encode()))}"


def encoded(header: str | bytes, payload: str | bytes, sign: Callable[[bytes], bytes] = rs256) -> str:
    """A token of exactly these JSON texts, signed."""
    texts = [text.encode() if isinstance(text, str) else text for text in (header, payload)]
    return seal(b64(texts[0]), b64(texts[1]), sign)


def token(header: Mapping[str, Any] | None = None, sign: Callable[[bytes], bytes] = rs256, **claims: Any) -> str:
    """A token that is right but for the given changes."""
    return encoded(json.dumps(changed(HEADER, header or {})), json.dumps(changed(CLAIMS, claims)), sign)


def identity(rules: IdentityRules = RULES, keys: FakeKeys | None = None, now_s: float = NOW_S) -> Identity:
    return Identity(rules, keys or FakeKeys(), lambda: now_s)


def call(value: str, user: str | None = None, **arguments: Any) -> Principal:
    return identity(**arguments).principal([f"Bearer {value}"], user)


def signed_with_the_public_key(message: bytes) -> bytes:
    public = key("google-1").public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hmac.new(public, message, hashlib.sha256).digest()


def es256(message: bytes) -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).sign(message, ec.ECDSA(hashes.SHA256()))


def pss(message: bytes) -> bytes:
    return key("google-1").sign(message, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())


def own_jwk() -> dict[str, str]:
    numbers = key("attacker").public_key().public_numbers()
    return {"kty": "RSA", "kid": "google-1", "n": b64(numbers.n.to_bytes(256)), "e": b64(numbers.e.to_bytes(3))}


def by_attacker(message: bytes) -> bytes:
    return rs256(message, "attacker")


def swapped(segment: int, value: str) -> str:
    segments = token().split(".")
    segments[segment] = value
    return ".".join(segments)


HEADER_JSON, CLAIMS_JSON = json.dumps(dict(HEADER)), json.dumps(dict(CLAIMS))
SIGNATURE = token().split(".")[2]

# Each is refused with a 401 that contains the text, whatever else is right about it.
ATTACKS: dict[str, tuple[str, str]] = {
    # The algorithm
    "alg-none-no-signature": (swapped(2, "").replace(b64(HEADER_JSON.encode()), b64(b'{"alg":"none"}')), "RS256"),
    "alg-none-with-kid": (token({"alg": "none"}), "RS256"),
    "alg-None-in-capitals": (token({"alg": "NONE"}), "RS256"),
    "alg-lower-case": (token({"alg": "rs256"}), "RS256"),
    "alg-absent": (token({"alg": ABSENT}), "RS256"),
    "alg-null": (token({"alg": None}), "RS256"),
    "alg-list": (token({"alg": ["RS256"]}), "RS256"),
    "hs256-by-public-key": (token({"alg": "HS256"}, signed_with_the_public_key), "RS256"),
    "rs256-but-hmac": (token({}, signed_with_the_public_key), "signature"),
    "es256": (token({"alg": "ES256"}, es256), "RS256"),
    "rs256-but-ecdsa": (token({}, es256), "signature"),
    "ps256": (token({"alg": "PS256"}, pss), "RS256"),
    "rs256-but-pss": (token({}, pss), "signature"),
    "rs384": (token({"alg": "RS384"}), "RS256"),
    "duplicate-alg": (encoded('{"alg":"none","kid":"google-1","alg":"RS256"}', CLAIMS_JSON), "unique keys"),
    "duplicate-alg-escaped": (encoded('{"alg":"RS256","kid":"google-1","\\u0061lg":"none"}', CLAIMS_JSON), "unique"),
    "crit": (token({"crit": ["exp"]}), "crit"),
    "crit-empty": (token({"crit": []}), "crit"),
    "b64-false": (token({"b64": False, "crit": ["b64"]}), "crit"),
    # The key
    "kid-absent": (token({"kid": ABSENT}), "kid"),
    "kid-empty": (token({"kid": ""}), "kid"),
    "kid-number": (token({"kid": 1}), "kid"),
    "kid-list": (token({"kid": ["google-1"]}), "kid"),
    "kid-unknown": (token({"kid": "google-2"}), "does not publish"),
    "kid-path": (token({"kid": "../../../../dev/null"}), "does not publish"),
    "kid-sql": (token({"kid": "x' UNION SELECT 'key"}), "does not publish"),
    "kid-url": (token({"kid": "https://attacker.example/key"}, by_attacker), "does not publish"),
    "jku": (token({"jku": "https://attacker.example/jwks"}, by_attacker), "signature"),
    "x5u": (token({"x5u": "https://attacker.example/x5u"}, by_attacker), "signature"),
    "jwk": (token({"jwk": own_jwk()}, by_attacker), "signature"),
    "x5c": (token({"x5c": ["MIIB"]}, by_attacker), "signature"),
    "another-key": (token({}, by_attacker), "signature"),
    "issuer-with-kid-of-another": (token({"kid": "other-1"}, lambda m: rs256(m, "other-1")), "does not publish"),
    "issuer-by-key-of-another": (token({}, lambda m: rs256(m, "other-1")), "signature"),
    # The signature
    "signature-absent": (swapped(2, ""), "signature"),
    "signature-truncated": (swapped(2, SIGNATURE[:-4]), "signature"),
    "signature-extended": (swapped(2, SIGNATURE + "AAAA"), "signature"),
    "signature-zero": (swapped(2, b64(bytes(256))), "signature"),
    "signature-one": (swapped(2, b64(bytes(255) + b"\x01")), "signature"),
    "signature-of-another-token": (swapped(2, token(sub="2").split(".")[2]), "signature"),
    "payload-of-another-token": (swapped(1, b64(json.dumps(changed(CLAIMS, {"email": ALICE})).encode())), "signature"),
    "signature-not-canonical": (swapped(2, SIGNATURE[:-1] + chr(ord(SIGNATURE[-1]) + 1)), "signature is not base64"),
    "signature-removed": (swapped(2, "SIGNATURE_REMOVED_BY_GOOGLE"), "x-serverless-authorization"),
    # The form
    "empty-segments": ("..", "JSON object"),
    "two-segments": (token().rpartition(".")[0], "three segments"),
    "four-segments": (token() + ".AAAA", "three segments"),
    "provider-key": ("sk-proj-0123456789", "three segments"),
    "padded": (seal(b64(HEADER_JSON.encode()) + "==", b64(CLAIMS_JSON.encode())), "header is not base64url"),
    "padded-signature": (swapped(2, SIGNATURE + "=="), "signature is not base64url"),
    "space-inside": (token().replace(".", ". ", 1), "payload is not base64url"),
    "space-before": (" " + token(), "header is not base64url"),
    "line-end-after": (token() + "\n", "signature is not base64url"),
    "standard-alphabet": (seal("eyJ+", b64(CLAIMS_JSON.encode())), "header is not base64url"),
    "length-one-over": (seal("eyJhb", b64(CLAIMS_JSON.encode())), "header is not base64url"),
    "two-joined": (f"{token()}, Bearer {token()}", "three segments"),
    "outside-ascii": (token() + "é", "ASCII"),
    "too-long": (token(pad="x" * MAX_TOKEN_BYTES), "longer"),
    "header-not-json": (encoded("RS256", CLAIMS_JSON), "header is not a JSON object"),
    "header-list": (encoded("[]", CLAIMS_JSON), "header is not a JSON object"),
    "header-utf16": (encoded(HEADER_JSON.encode("utf-16"), CLAIMS_JSON), "header is not a JSON object"),
    "payload-string": (encoded(HEADER_JSON, '"x"'), "payload is not a JSON object"),
    "payload-nan": (encoded(HEADER_JSON, CLAIMS_JSON[:-1] + ',"x":NaN}'), "payload is not a JSON object"),
    "payload-not-utf8": (encoded(HEADER_JSON, b'{"x":"\xff"}'), "payload is not a JSON object"),
    "payload-deep": (encoded(HEADER_JSON, '{"x":' + "[" * 5_000 + "]" * 5_000 + "}"), "payload is not a JSON object"),
    "payload-huge-integer": (encoded(HEADER_JSON, '{"exp":' + "9" * 5_000 + "}"), "payload is not a JSON object"),
    "duplicate-claim": (encoded(HEADER_JSON, CLAIMS_JSON[:-1] + f',"email":"{ALICE}"}}'), "unique keys"),
    "duplicate-nested": (encoded(HEADER_JSON, CLAIMS_JSON[:-1] + ',"x":[{"a":1,"a":2}]}'), "unique keys"),
    # The claims
    "aud-wrong": (token(aud="https://attacker.example"), AUDIENCE),
    "aud-absent": (token(aud=ABSENT), "aud"),
    "aud-null": (token(aud=None), "aud"),
    "aud-empty-list": (token(aud=[]), "aud"),
    "aud-mixed-list": (token(aud=[AUDIENCE, None]), "aud"),
    "aud-object": (token(aud={AUDIENCE: True}), "aud"),
    "aud-prefix": (token(aud=AUDIENCE + "/"), "aud"),
    "iss-wrong": (token(iss="https://attacker.example"), "iss"),
    "iss-absent": (token(iss=ABSENT), "iss"),
    "iss-null": (token(iss=None), "iss"),
    "iss-empty": (token(iss=""), "iss"),
    "iss-list": (token(iss=[GOOGLE]), "iss"),
    "iss-prefix": (token(iss=GOOGLE + ".attacker.example"), "iss"),
    "iss-without-scheme": (token(iss="accounts.google.com"), "iss"),
    "expired": (token(iat=NOW_S - 3600, exp=NOW_S - TOKEN_SKEW_S), "expired"),
    "exp-absent": (token(exp=ABSENT), "`exp` is not a time"),
    "exp-string": (token(exp=str(NOW_S + 3600)), "`exp` is not a time"),
    "exp-true": (token(exp=True), "`exp` is not a time"),
    "exp-infinite": (encoded(HEADER_JSON, CLAIMS_JSON.replace(str(NOW_S + 3600), "1e999")), "`exp` is not a time"),
    "exp-beyond-dates": (token(exp=10**30), "`exp` is not a time"),
    "exp-before-iat": (token(iat=NOW_S + 5, exp=NOW_S + 5), "lifetime"),
    "lifetime-too-long": (token(exp=NOW_S + MAX_TOKEN_LIFETIME_S + 1), "lifetime"),
    "iat-absent": (token(iat=ABSENT), "`iat` is not a time"),
    "iat-negative": (token(iat=-1), "`iat` is not a time"),
    "iat-future": (token(iat=NOW_S + TOKEN_SKEW_S + 1), "not valid yet"),
    "nbf-future": (token(nbf=NOW_S + TOKEN_SKEW_S + 1), "not valid yet"),
    "nbf-string": (token(nbf="0"), "`nbf` is not a time"),
    "nbf-true": (token(nbf=True), "`nbf` is not a time"),
    "nbf-null": (token(nbf=None), "`nbf` is not a time"),
    "email-absent": (token(email=ABSENT), "email"),
    "email-list": (token(email=[RANKER]), "email"),
    "email-empty": (token(email=""), "plain address"),
    "email-two-at": (token(email=f"x@evil@{RANKER}"), "plain address"),
    "email-line-end": (token(email=RANKER + "\n"), "plain address"),
    "email-kelvin-sign": (token(email=RANKER.replace("k", "\u212a")), "plain address"),
    "email-surrogate": (token(email="\ud800" + RANKER), "plain address"),
    "email-too-long": (token(email="a" * MAX_USER_CHARS + "@example.com"), "plain address"),
    "email-verified-absent": (token(email_verified=ABSENT), "not verified"),
    "email-verified-false": (token(email_verified=False), "not verified"),
    "email-verified-string": (token(email_verified="true"), "not verified"),
    "email-verified-one": (token(email_verified=1), "not verified"),
}


@pytest.mark.parametrize(("attack", "says"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attack_gets_a_401_that_explains_without_echo(attack: str, says: str) -> None:
    keys = FakeKeys()
    subject = identity(keys=keys)
    for _ in range(2):  # the second time as well: a refusal is not remembered as a success
        with pytest.raises(Unauthenticated, match=says) as refusal:
            subject.principal([f"Bearer {attack}"], None)
        assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
        assert not any(len(part) > 8 and part in refusal.value.message for part in attack.split("."))
    assert {issuer for issuer, _ in keys.asked} <= {GOOGLE}


@pytest.mark.parametrize(
    ("authorization", "says"),
    [
        ([], "No credentials"),
        ([""], "must be"),
        (["Bearer"], "must be"),
        (["Bearer "], "must be"),
        ([token()], "must be"),
        ([f"Basic {token()}"], "must be"),
        ([f"Bearer\t{token()}"], "must be"),
        ([f"Bearer  {token()}"], "base64url"),
        ([f"Bearer {token()}"] * 2, "More than one"),
    ],
    ids=["none", "empty", "scheme-only", "no-token", "no-scheme", "basic", "tab", "two-spaces", "twice"],
)
def test_authorization_header(authorization: list[str], says: str) -> None:
    with pytest.raises(Unauthenticated, match=says):
        identity().principal(authorization, None)


ACCEPTED: dict[str, tuple[str, Principal]] = {
    "service": (token(), Principal(RANKER, RANKER, "search", None)),
    "service-of-second-team": (token(email=FRONTEND), Principal(FRONTEND, FRONTEND, "all", None)),
    "human": (token(email=ALICE), Principal(ALICE, None, None, ALICE)),
    "address-in-capitals": (token(email=RANKER.upper()), Principal(RANKER, RANKER, "search", None)),
    "other-issuer": (
        token({"kid": "other-1"}, lambda m: rs256(m, "other-1"), iss=OTHER),
        Principal(RANKER, RANKER, "search", None),
    ),
    "second-audience": (token(aud="https://second.example"), Principal(RANKER, RANKER, "search", None)),
    "audience-list": (token(aud=["x", AUDIENCE]), Principal(RANKER, RANKER, "search", None)),
    "iat-in-the-skew": (token(iat=NOW_S + TOKEN_SKEW_S), Principal(RANKER, RANKER, "search", None)),
    "exp-in-the-skew": (token(iat=NOW_S - 3600, exp=NOW_S - 9), Principal(RANKER, RANKER, "search", None)),
    "nbf-past": (token(nbf=NOW_S - 1), Principal(RANKER, RANKER, "search", None)),
    "times-as-fractions": (token(iat=NOW_S + 0.5), Principal(RANKER, RANKER, "search", None)),
    "longest-lifetime": (token(exp=NOW_S + MAX_TOKEN_LIFETIME_S), Principal(RANKER, RANKER, "search", None)),
    "no-typ": (token({"typ": ABSENT}), Principal(RANKER, RANKER, "search", None)),
    "header-names-other-keys": (token({"jku": "https://attacker.example"}), Principal(RANKER, RANKER, "search", None)),
}


@pytest.mark.parametrize(("good", "principal"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(good: str, principal: Principal) -> None:
    subject = identity()
    assert subject.principal([f"Bearer {good}"], None) == principal
    assert subject.principal([f"bEARER {good}"], None) == principal  # remembered; any case of the scheme


@pytest.mark.parametrize(
    ("pattern", "email", "allowed"),
    [
        ("*@example.com", ALICE, True),
        ("*@Example.COM", ALICE, True),
        ("alice@example.com", "ALICE@example.com", True),
        ("al?ce@example.com", ALICE, True),
        ("[ab]lice@example.com", ALICE, True),
        ("alice@example.com", "malice@example.com", False),
        ("*@example.com", "alice@example.com.attacker.example", False),
        ("*@example.com", "alice@notexample.com", False),
        ("alice@example.com", "alice@exampleXcom", False),
        ("", ALICE, False),
    ],
    ids=["star", "case", "case-of-claim", "one", "set", "start", "end", "domain", "dot", "empty"],
)
def test_allow_pattern_is_matched_on_the_whole_address(pattern: str, email: str, allowed: bool) -> None:
    rules = replace(RULES, allow=("nobody@nowhere.example", pattern))
    if allowed:
        assert call(token(email=email), rules=rules).email == email.lower()
    else:
        with pytest.raises(Forbidden) as refusal:
            call(token(email=email), rules=rules)
        assert (refusal.value.status, refusal.value.code) == (403, "caller_not_allowed")


def test_an_empty_allow_list_allows_nobody() -> None:
    with pytest.raises(Forbidden):
        call(token(), rules=replace(RULES, allow=()))


def test_an_address_that_only_looks_like_a_service_is_a_human() -> None:
    rules = replace(RULES, allow=("*",))
    email = "x@p.iam.gserviceaccount.com.attacker.example"
    assert call(token(email=email), rules=rules) == Principal(email, None, None, email)


@pytest.mark.parametrize(
    ("user", "named"),
    [(ALICE, ALICE), ("Alice@Example.com", ALICE), ("u-42_aB", "u-42_aB"), ("a b", "a b"), ("x" * MAX_USER_CHARS,) * 2],
    ids=["address", "address-in-capitals", "opaque", "space-inside", "longest"],
)
def test_a_delegating_service_names_its_user(user: str, named: str) -> None:
    subject = identity()
    bearer = [f"Bearer {token(email=FRONTEND)}"]
    for _ in range(2):
        assert subject.principal(bearer, user) == Principal(FRONTEND, FRONTEND, "all", named)
    assert subject.principal(bearer, None).user is None  # what one request named is not remembered


@pytest.mark.parametrize("user", [ALICE, "", "\n"], ids=["address", "empty", "malformed"])
@pytest.mark.parametrize("email", [RANKER, ALICE, "bob@example.com"], ids=["service", "human-in-list", "human"])
def test_only_a_delegating_service_may_name_a_user(email: str, user: str) -> None:
    with pytest.raises(Forbidden, match="x-tollgate-user"):
        call(token(email=email), user)


@pytest.mark.parametrize(
    "user",
    ["", " ", " alice", "alice ", "a\nb", "a\x00b", "a\x7fb", "a\tb", "é", "\ud800", "x" * (MAX_USER_CHARS + 1)],
    ids=["empty", "space", "before", "after", "line", "nul", "del", "tab", "latin", "surrogate", "long"],
)
def test_a_malformed_user_is_refused(user: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        call(token(email=FRONTEND), user)
    assert refusal.value.param == "x-tollgate-user"


def test_an_unknown_key_says_whose_so_that_it_can_be_fetched() -> None:
    with pytest.raises(UnknownKey) as refusal:
        call(token({"kid": "google-2"}))
    assert (refusal.value.issuer, refusal.value.kid, refusal.value.status) == (GOOGLE, "google-2", 401)


@pytest.mark.parametrize(
    "claims",
    [{"aud": "x"}, {"iss": "https://attacker.example"}, {"exp": NOW_S - 100, "iat": NOW_S - 200}],
    ids=["aud", "iss", "exp"],
)
def test_a_token_that_cannot_be_right_asks_for_no_key(claims: dict[str, Any]) -> None:
    keys = FakeKeys()
    with pytest.raises(Unauthenticated):
        call(token({"kid": "google-2"}, **claims), keys=keys)
    assert keys.asked == []


def counted(keys: FakeKeys) -> CountingVerifier:
    verifier = CountingVerifier(verifier_of("google-1"))
    keys.keys[GOOGLE, "google-1"] = verifier
    return verifier


def test_a_verified_token_is_remembered() -> None:
    keys = FakeKeys()
    verifier = counted(keys)
    subject = identity(keys=keys)
    bearer = [f"Bearer {token()}"]
    assert subject.principal(bearer, None) == subject.principal(bearer, None)
    assert verifier.uses == 1


def test_a_remembered_token_still_expires() -> None:
    now_s = [float(NOW_S)]
    subject = Identity(RULES, FakeKeys(), lambda: now_s[0])
    bearer = [f"Bearer {token()}"]
    subject.principal(bearer, None)
    now_s[0] = NOW_S + 3600 + TOKEN_SKEW_S - 0.5
    subject.principal(bearer, None)
    now_s[0] = NOW_S + 3600 + TOKEN_SKEW_S
    with pytest.raises(Unauthenticated, match="expired"):
        subject.principal(bearer, None)


def test_a_withdrawn_key_takes_its_remembered_tokens_along() -> None:
    keys = FakeKeys()
    subject = identity(keys=keys)
    bearer = [f"Bearer {token()}"]
    subject.principal(bearer, None)
    del keys.keys[GOOGLE, "google-1"]
    with pytest.raises(UnknownKey):
        subject.principal(bearer, None)


def test_a_key_replaced_under_the_same_kid_is_not_trusted_from_memory() -> None:
    keys = FakeKeys()
    subject = identity(keys=keys)
    bearer = [f"Bearer {token()}"]
    subject.principal(bearer, None)
    keys.keys[GOOGLE, "google-1"] = verifier_of("attacker")
    with pytest.raises(Unauthenticated, match="signature"):
        subject.principal(bearer, None)


def test_stale_keys_end_remembered_tokens_with_a_503() -> None:
    keys = FakeKeys()
    subject = identity(keys=keys)
    bearer = [f"Bearer {token()}"]
    subject.principal(bearer, None)
    keys.stale = True
    with pytest.raises(Unavailable):
        subject.principal(bearer, None)
    with pytest.raises(Unavailable):
        subject.principal([f"Bearer {token(sub='2')}"], None)
    keys.stale = False
    subject.principal(bearer, None)


def test_the_oldest_remembered_token_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_VERIFIED_TOKENS >= 1_000
    monkeypatch.setattr("extproc.identity.MAX_VERIFIED_TOKENS", 2)
    keys = FakeKeys()
    verifier = counted(keys)
    subject = identity(keys=keys)
    first, second, third = ([f"Bearer {token(sub=sub)}"] for sub in "123")
    for bearer in (first, second, third, third, second):
        subject.principal(bearer, None)
    assert verifier.uses == 3
    subject.principal(first, None)
    assert verifier.uses == 4


def test_a_token_is_remembered_whole() -> None:
    """One bit of the signature, header or payload changed is another token."""
    subject = identity()
    good = token()
    subject.principal([f"Bearer {good}"], None)
    for position in range(0, len(good), 7):
        other = "A" if good[position] != "A" else "B"
        with pytest.raises(TollgateError) as refusal:
            subject.principal([f"Bearer {good[:position]}{other}{good[position + 1 :]}"], None)
        assert refusal.value.status == 401
