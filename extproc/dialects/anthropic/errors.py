"""Errors as Anthropic writes them, both ways (https://platform.claude.com/docs/en/api/errors)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from extproc.dialects.fields import parse
from extproc.errors import BudgetExhausted, ProviderError, TollgateError

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# In a stream the status has gone out as 200 before the error came.
_STATUSES = {kind: status for status, kind in _TYPES.items()} | {"invalid_request_error": 400, "api_error": 500}


def read_error(status: int, body: bytes) -> ProviderError:
    """A provider's error: Anthropic's form, or Google's and Azure's, whose front ends answer some calls themselves."""
    said = parse(body)
    if isinstance(said, list) and said:  # Vertex AI, where a stream was asked for
        said = said[0]
    error = said.get("error") if isinstance(said, dict) else None
    return _provider_error(error if isinstance(error, dict) else {}, status)


def read_error_event(event: Mapping[str, Any]) -> ProviderError:
    """The same of an `error` event. A type that is not known is a failure of the provider's."""
    error = event.get("error")
    error = error if isinstance(error, dict) else {}
    kind = error.get("type")
    return _provider_error(error, _STATUSES.get(kind, 500) if isinstance(kind, str) else 500)


def _provider_error(error: Mapping[str, Any], status: int) -> ProviderError:
    message = error.get("message")
    codes = (error.get(name) for name in ("type", "status", "code"))
    return ProviderError(
        message if isinstance(message, str) and message else f"The provider answered with status {status}.",
        status=status,
        code=next((code for code in codes if isinstance(code, str) and code), None),
    )


def render_error(error: TollgateError) -> bytes:
    """The body that Anthropic's clients turn into their own exceptions, by the HTTP status."""
    return orjson.dumps({"type": "error", "error": _fields(error)})


def render_error_event(error: TollgateError, usage: Mapping[str, object] | None = None) -> bytes:
    """An event for which Anthropic's clients raise APIStatusError in the middle of a stream.

    `usage`: the figures until then, which are billed all the same.
    """
    figures = {} if usage is None else {"usage": usage}
    return b"event: error\ndata: " + orjson.dumps({"type": "error", "error": _fields(error), **figures}) + b"\n\n"


def _fields(error: TollgateError) -> dict[str, object]:
    """`details.error_code` is where Anthropic's own finer codes stand; a budget is named there and in the message."""
    details = {"error_code": error.code, "param": error.param}
    if isinstance(error, BudgetExhausted):
        details["budget"] = error.budget_id
    return {
        "type": _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error"),
        "message": error.message,
        "details": {name: value for name, value in details.items() if value is not None},
    }
