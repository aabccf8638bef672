"""Who calls: Google ID tokens, verified. RS256 only; nothing is fetched, and nothing in a token says where keys are.

Rules: RFC 7519 (JWT), RFC 8725 (its best practices), OpenID Connect Core 3.1.3.7, Google's "Verify the ID token".
"""

from __future__ import annotations

import binascii
import fnmatch
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from extproc.errors import BadRequest, Forbidden, Unauthenticated
from extproc.limits import (
    MAX_TOKEN_BYTES,
    MAX_TOKEN_LIFETIME_S,
    MAX_USER_CHARS,
    MAX_VERIFIED_TOKENS,
    TOKEN_SKEW_S,
)
from extproc.records import IdentityRules, Principal

SERVICE_SUFFIX = ".gserviceaccount.com"
USER_HEADER = "x-tollgate-user"

_REMOVED_SIGNATURE = b"SIGNATURE_REMOVED_BY_GOOGLE"
_ADDRESS = re.compile(r"[!-?A-~]+@[!-?A-~]+")  # visible ASCII around exactly one @
_USER = re.compile(r"[!-~]([ -~]*[!-~])?")
_MAX_TIME_S = 2**53  # beyond any date, and exact both as an int and as a float


class Verifier(Protocol):
    """One public key: `google.auth.crypt.RSAVerifier`."""

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether the key signed `message`. Never raises."""


class KeySet(Protocol):
    """The issuers' keys, as they are now."""

    def verifier(self, issuer: str, kid: str) -> Verifier | None:
        """The issuer's key of this id, the same object until the key changes. Raises Unavailable if too stale."""


class UnknownKey(Unauthenticated):
    """No such key is known now. Refetch `issuer`'s keys (at a limited rate) and try again; else it is a plain 401."""

    def __init__(self, issuer: str, kid: str) -> None:
        super().__init__("The ID token is signed with a key that its issuer does not publish.")
        self.issuer = issuer
        self.kid = kid


@dataclass(frozen=True, slots=True)
class _Token:
    """A token taken apart. Nothing in it is to be believed before `signature` has been checked."""

    kid: str
    claims: dict[str, Any]
    signed: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token that was verified, and the key that did it."""

    principal: Principal
    delegates: bool
    issuer: str
    kid: str
    verifier: Verifier
    expires_s: float


class Identity:
    """Verifies callers under one policy. A changed policy needs a new object, so that nothing old is remembered."""

    def __init__(self, rules: IdentityRules, keys: KeySet, clock_s: Callable[[], float]) -> None:
        """`clock_s` gives Unix time in seconds."""
        self._rules = rules
        self._keys = keys
        self._clock_s = clock_s
        self._allowed = _matcher(rules.allow)
        self._delegates = _matcher(rules.delegates)
        self._teams = tuple((team, _matcher(patterns)) for team, patterns in rules.teams)
        self._remembered: OrderedDict[bytes, _Verified] = OrderedDict()

    def principal(self, authorization: Sequence[str], user_header: str | None) -> Principal:
        """The caller, from every value of `authorization` and the value of `x-tollgate-user`.

        Raises Unauthenticated, UnknownKey (a 401 that may be worth a refetch), Forbidden, BadRequest for a malformed
        user, or Unavailable while the issuer's keys are too stale. No message holds any part of the token.
        """
        verified = self._verified(_bearer_token(authorization))
        caller = verified.principal
        if user_header is None:
            return caller
        if not verified.delegates:
            raise Forbidden(f"{caller.email} may not act for other users: `{USER_HEADER}` is for delegating services.")
        return Principal(caller.email, caller.service, caller.team, _delegated_user(user_header))

    def _verified(self, token: bytes) -> _Verified:
        digest = sha256(token).digest()
        known = self._remembered.get(digest)
        if known is not None:
            # A key that was withdrawn takes the tokens it signed with it, at the key set's next refresh.
            if self._clock_s() < known.expires_s and self._keys.verifier(known.issuer, known.kid) is known.verifier:
                return known
            del self._remembered[digest]
        verified = self._verify(_parse(token))
        if len(self._remembered) >= MAX_VERIFIED_TOKENS:
            self._remembered.popitem(last=False)
        self._remembered[digest] = verified
        return verified

    def _verify(self, token: _Token) -> _Verified:
        issuer = self._accepted_issuer(token.claims)
        self._check_audience(token.claims)
        expires_s = _check_times(token.claims, self._clock_s())
        verifier = self._keys.verifier(issuer, token.kid)
        if verifier is None:
            raise UnknownKey(issuer, token.kid)
        if not verifier.verify(token.signed, token.signature):
            raise Unauthenticated("The ID token's signature is not valid.")
        email = _verified_email(token.claims)
        if not self._allowed(email):
            raise Forbidden(f"{email} is not among the callers that the policy allows.")
        principal = self._principal_of(email)
        delegates = principal.service is not None and self._delegates(email)
        return _Verified(principal, delegates, issuer, token.kid, verifier, expires_s)

    def _accepted_issuer(self, claims: dict[str, Any]) -> str:
        issuer: str = claims.get("iss", "")
        if issuer not in self._rules.issuers:
            raise Unauthenticated("The ID token's issuer (`iss`) is not one that this gateway accepts.")
        return issuer

    def _check_audience(self, claims: dict[str, Any]) -> None:
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not all(isinstance(one, str) for one in audiences) or not set(audiences) & set(self._rules.audiences):
            expected = " or ".join(self._rules.audiences)
            raise Unauthenticated(f"The ID token's audience (`aud`) is not this gateway: ask for one for {expected}.")

    def _principal_of(self, email: str) -> Principal:
        team = next((team for team, matches in self._teams if matches(email)), None)
        if email.endswith(SERVICE_SUFFIX):
            return Principal(email, service=email, team=team, user=None)
        return Principal(email, service=None, team=team, user=email)


def _bearer_token(authorization: Sequence[str]) -> bytes:
    if not authorization:
        raise Unauthenticated("No credentials: send a Google ID token as `authorization: Bearer <token>`.")
    if len(authorization) > 1:
        raise Unauthenticated("More than one `authorization` header.")
    scheme, _, token = authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("The `authorization` header must be `Bearer <Google ID token>`.")
    if len(token) > MAX_TOKEN_BYTES:
        raise Unauthenticated(f"The token is longer than {MAX_TOKEN_BYTES} bytes.")
    if not token.isascii():
        raise Unauthenticated("The token is not a JSON Web Token: it holds characters outside ASCII.")
    return token.encode()


def _parse(token: bytes) -> _Token:
    """Take a token in JWS compact form apart (RFC 7515, 7.1), and refuse every header but the one kind accepted."""
    segments = token.split(b".")
    if len(segments) != 3:
        raise Unauthenticated("The credentials are not an ID token (three segments): a provider's API key won't do.")
    if segments[2] == _REMOVED_SIGNATURE:
        raise Unauthenticated(
            "Cloud Run checked this ID token and removed its signature, so that it cannot be verified again. Either "
            "send the token for Cloud Run in `x-serverless-authorization` and a second one in `authorization`, or "
            "have the gateway's Cloud Run service annotated with `run.googleapis.com/invoker-iam-disabled: true`."
        )
    header = _json_object(segments[0], "header")
    return _Token(
        kid=_checked_kid(header),
        claims=_json_object(segments[1], "payload"),
        signed=segments[0] + b"." + segments[1],
        signature=_base64url(segments[2], "signature"),
    )


def _checked_kid(header: dict[str, Any]) -> str:
    # The algorithm is ours to choose, never the token's (RFC 8725, 3.1). `jku`, `jwk`, `x5u` and `x5c` are not read.
    if header.get("alg") != "RS256":
        raise Unauthenticated("The ID token must be signed with RS256.")
    if "crit" in header:  # extensions that must be understood, and none is (RFC 7515, 4.1.11)
        raise Unauthenticated("The ID token's header asks for extensions (`crit`) that are not supported.")
    kid = header.get("kid")
    if not isinstance(kid, str) or not kid:
        raise Unauthenticated("The ID token's header does not name its key (`kid`).")
    return kid


def _base64url(segment: bytes, name: str) -> bytes:
    """Decode, and refuse all but the one canonical form: padding, white space, other alphabets, stray bits."""
    try:
        decoded = urlsafe_b64decode(segment + b"=" * (-len(segment) % 4))
    except binascii.Error:
        decoded = b""
    if urlsafe_b64encode(decoded).rstrip(b"=") != segment:
        raise Unauthenticated(f"The ID token's {name} is not base64url.")
    return decoded


def _json_object(segment: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(
            _base64url(segment, name).decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unauthenticated(f"The ID token's {name} is not a JSON object with unique keys.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):  # two parsers may each take another one
        raise ValueError("duplicate keys")
    return members


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)


def _check_times(claims: dict[str, Any], now_s: float) -> float:
    """Check `exp`, `iat` and `nbf`; return when the token ends, the skew included."""
    expires_s, issued_s = _time(claims, "exp"), _time(claims, "iat")
    if now_s >= expires_s + TOKEN_SKEW_S:
        raise Unauthenticated("The ID token has expired: get a new one.")
    if now_s < max(issued_s, _time(claims, "nbf") if "nbf" in claims else 0) - TOKEN_SKEW_S:
        raise Unauthenticated("The ID token is not valid yet: check the clocks.")
    if not 0 < expires_s - issued_s <= MAX_TOKEN_LIFETIME_S:
        raise Unauthenticated("The ID token's lifetime (`exp` - `iat`) is not that of an ID token.")
    return expires_s + TOKEN_SKEW_S


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_TIME_S:
        raise Unauthenticated(f"The ID token's `{name}` is not a time in seconds.")
    return value


def _verified_email(claims: dict[str, Any]) -> str:
    """The address in lower case, so that one caller has one budget. Outside ASCII, folding would make two into one."""
    email = claims.get("email")
    if not isinstance(email, str):
        raise Unauthenticated("The ID token has no `email`: ask for one with the full format or the email scope.")
    if claims.get("email_verified") is not True:  # a boolean in ID tokens; only the tokeninfo endpoint writes "true"
        raise Unauthenticated("The ID token's `email` is not verified by its issuer.")
    if len(email) > MAX_USER_CHARS or not _ADDRESS.fullmatch(email):
        raise Unauthenticated("The ID token's `email` is not a plain address.")
    return email.lower()


def _delegated_user(value: str) -> str:
    """The user as the service names it; an address in lower case, the same as if its owner had called.

    Field values outside ASCII have no agreed encoding (RFC 9110, 5.5), hence are refused.
    """
    if len(value) > MAX_USER_CHARS or not _USER.fullmatch(value):
        raise BadRequest(
            f"`{USER_HEADER}` must be 1 to {MAX_USER_CHARS} printable ASCII characters.", param=USER_HEADER
        )
    return value.lower() if "@" in value else value


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether any of the shell patterns matches a whole address, in any case."""
    matches = tuple(re.compile(fnmatch.translate(pattern.lower())).match for pattern in patterns)
    return lambda email: any(match(email) for match in matches)
