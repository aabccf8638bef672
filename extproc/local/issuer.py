"""The development issuer: mints ID tokens like Google's, which the same code verifies. For the local stack only."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from google.auth import jwt
from google.auth.crypt import RSASigner

from extproc.limits import MIN_RSA_BITS
from extproc.local.http import Request, Response, Server, serve

DEV_ISSUER = "https://dev.tollgate.local"
KEY_FILE = "dev-issuer.pem"
CERTIFICATES_PATH = "/oauth2/v1/certs"


class DevIssuer:
    """An RSA key that signs tokens of `issuer`."""

    def __init__(self, key: rsa.RSAPrivateKey, issuer: str = DEV_ISSUER) -> None:
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.issuer = issuer
        self.kid = sha256(public).hexdigest()[:16]
        self._public_pem = public.decode()
        self._signer = RSASigner(key, key_id=self.kid)  # type: ignore[no-untyped-call]

    @classmethod
    def open(cls, state_dir: Path) -> DevIssuer:
        """The issuer whose key is kept in `state_dir`; the key is made at first use. Raises OSError or ValueError."""
        path = state_dir / KEY_FILE
        if not path.exists():
            _create_key(path)
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError(f"{path} does not hold an RSA key")
        return cls(key)

    def mint(self, email: str, audience: str, ttl_s: int, now_s: float, **claims: Any) -> str:
        """An ID token of the form that Google's metadata server gives; `claims` replace or add to its own."""
        issued_s = int(now_s)
        payload = {
            "iss": self.issuer,
            "aud": audience,
            "sub": email,
            "email": email,
            "email_verified": True,
            "iat": issued_s,
            "exp": issued_s + ttl_s,
        }
        token: bytes = jwt.encode(self._signer, payload | claims)  # type: ignore[no-untyped-call]
        return token.decode()

    def certificates(self) -> dict[str, str]:
        """The public key as PEM by `kid`, in the form of Google's `oauth2/v1/certs`."""
        return {self.kid: self._public_pem}


async def serve_certificates(issuer: DevIssuer, port: int = 0, max_age_s: int = 300) -> Server:
    """Serve the issuer's key on loopback, at CERTIFICATES_PATH."""
    body = json.dumps(issuer.certificates()).encode()
    headers = (("content-type", "application/json"), ("cache-control", f"public, max-age={max_age_s}"))

    async def handle(request: Request) -> Response:
        return Response(200, headers, body) if request.target == CERTIFICATES_PATH else Response(404)

    return await serve(handle, port=port)


def _create_key(path: Path) -> None:
    """Write a new key, whole and readable by its owner only. Of two processes that do so, the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = rsa.generate_private_key(public_exponent=65537, key_size=MIN_RSA_BITS)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        Path(temporary).unlink()
