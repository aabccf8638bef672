"""Every way in which Tollgate refuses or fails, each with its HTTP status, its code and a message safe to show.

A message never holds a token, a key, or text that a provider sent. `type` and `code` are OpenAI's own where it has
one, since callers' clients already branch on them.
"""

from __future__ import annotations


class TollgateError(Exception):
    """The root. `message` is shown to the caller as it is; `param` names the offending field of the request."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class BadRequest(TollgateError):
    """The caller's request is malformed, or asks for what the policy does not offer."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unauthenticated(TollgateError):
    """No token, or a token that does not verify."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(TollgateError):
    """A verified caller that the policy does not allow."""

    status = 403
    type = "permission_error"
    code = "caller_not_allowed"


class NotFound(TollgateError):
    """A path that the gateway does not serve."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowed(TollgateError):
    """A known path with another method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTooLarge(TollgateError):
    """A body above `limits.MAX_REQUEST_BYTES`."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMedia(TollgateError):
    """A body that is compressed, or not JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class BudgetExhausted(TollgateError):
    """A hard budget has less left than the request must hold. `retry_after_s` runs to the budget's reset.

    `may_clear`: what lacks is only held by open requests, and may be free again when they end.
    """

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"

    def __init__(
        self, message: str, *, budget_id: str, retry_after_s: int | None = None, may_clear: bool = False
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.budget_id = budget_id
        self.may_clear = may_clear


class UpstreamFailure(TollgateError):
    """The provider's answer cannot be passed on: not metered, not complete, or about the gateway's own key."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"


class ProviderError(TollgateError):
    """What a provider answered instead of an answer, in its own words: secrets are taken out where it is passed on.

    `status` is the HTTP status that it came with, or, for an event of a stream, the one that stands for it.
    """

    type = "upstream_error"
    code = "upstream_error"

    def __init__(self, message: str, *, status: int, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.type = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


class Unavailable(TollgateError):
    """A dependency that money or identity needs cannot be reached: fail closed. Worth a try in a second."""

    status = 503
    type = "service_unavailable"
    code = "service_unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class ProtocolViolation(Exception):
    """Envoy, or whoever speaks to the processor, broke the order of ext_proc. Ends the gRPC stream with an error."""


class StreamTooLarge(Exception):
    """One event of a provider's stream is longer than its bound. The stream is cut, and what came is counted."""


class LedgerUnavailable(Exception):
    """The ledger did not answer in time, or answered with an error. Nothing is known about the operation."""


class LedgerRefused(LedgerUnavailable):
    """Redis answered, with an error: about this command, so that others may well succeed."""


class PolicyInvalid(Exception):
    """A policy that cannot be used. `problems` are `line N: field: what is wrong`, in the file's order."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# OpenAI's names of what a status means; the other dialects have their own tables.
_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
    529: "overloaded_error",
}
