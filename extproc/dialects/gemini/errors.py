"""Google's errors, both ways: https://google.aip.dev/193, with the details of google.rpc.

{"error": {"code": 429, "message": "…", "status": "RESOURCE_EXHAUSTED", "details": [{"@type": …RetryInfo, …}]}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import Any

from extproc.dialects.fields import dicts, parse
from extproc.dialects.gemini.names import dumps
from extproc.errors import ProviderError, TollgateError

RPC = "type.googleapis.com/google.rpc."
DOMAIN = "tollgate"

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    402: "RESOURCE_EXHAUSTED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_HTTP = {name: status for status, name in _STATUS.items()} | {
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "ALREADY_EXISTS": 409,
    "UNKNOWN": 500,
    "DATA_LOSS": 500,
}
_DELAY = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)s")


def render(error: TollgateError) -> bytes:
    """The code goes into an ErrorInfo, a field's name into a BadRequest, the time to wait into a RetryInfo."""
    details: list[dict[str, Any]] = [
        {"@type": RPC + "ErrorInfo", "reason": str(error.code).upper(), "domain": DOMAIN},
    ]
    if error.param is not None:
        violation = {"field": error.param, "description": error.message}
        details.append({"@type": RPC + "BadRequest", "fieldViolations": [violation]})
    if error.retry_after_s is not None:
        details.append({"@type": RPC + "RetryInfo", "retryDelay": f"{error.retry_after_s}s"})
    status = _STATUS.get(error.status) or ("UNAVAILABLE" if error.status > 500 else "INVALID_ARGUMENT")
    return dumps(
        {"error": {"code": error.status, "message": error.message, "status": status, "details": details}},
    )


def read(status: int, body: bytes) -> ProviderError:
    """An error's body, which Vertex AI may put into an array. Any bytes."""
    found = error_in(parse(body))
    return _read(found, status) if found is not None else ProviderError(_without_words(status), status=status)


def read_event(error: Mapping[str, Any]) -> ProviderError:
    """An error in the middle of a stream, which says itself what status it stands for."""
    code = error.get("code")
    if type(code) is not int or not 400 <= code <= 599:
        code = _HTTP.get(str(error.get("status")), 500)
    return _read(error, code)


def error_in(value: object) -> dict[str, Any] | None:
    """What is under `error`, where `value` is an error's body."""
    if isinstance(value, list):
        value = next(iter(dicts(value)), None)
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else None


def _read(error: Mapping[str, Any], status: int) -> ProviderError:
    text = error.get("message")
    details = {str(detail.get("@type")).removeprefix(RPC): detail for detail in dicts(error.get("details"))}
    reason = details.get("ErrorInfo", {}).get("reason") or error.get("status")
    violation = next(iter(dicts(details.get("BadRequest", {}).get("fieldViolations"))), {})
    field = violation.get("field")
    provider_error = ProviderError(
        text if isinstance(text, str) and text else _without_words(status),
        status=status,
        code=reason.lower() if isinstance(reason, str) and reason else None,
        param=field if isinstance(field, str) and field else None,
    )
    provider_error.retry_after_s = _seconds(details.get("RetryInfo", {}).get("retryDelay"))
    return provider_error


def _seconds(delay: object) -> int | None:
    """`34.4s`, as protobuf writes a duration."""
    found = _DELAY.fullmatch(delay) if isinstance(delay, str) else None
    return ceil(float(found[1])) if found else None


def _without_words(status: int) -> str:
    return f"The provider answered with status {status}."
