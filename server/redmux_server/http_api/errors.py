"""Errors of the tree, in OpenAI's body; the one place that knows both."""

import dataclasses
import http
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from redmux.errors import (
    AbortedError,
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RedmuxError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from redmux_server.http_api.sent import Sent
from redmux_server.models.too_long import TooLongError
from redmux_server.services.spec import GenerationSpec, ScoreSpec, TokenizeSpec

DONE = b"data: [DONE]\n\n"  # the last event of a stream
_RETRY_AFTER_S = 1.0  # where the server is loading or draining
_TYPES = (
    (UnauthenticatedError, "authentication_error"),
    (PermissionDeniedError, "permission_error"),
    (ResourceExhaustedError, "rate_limit_error"),
)
_CODES = (
    (UnauthenticatedError, "invalid_api_key"),
    (ResourceExhaustedError, "rate_limit_exceeded"),
    (TooLongError, "context_length_exceeded"),
)
# Messages of the services speak of gRPC's methods.
_CALLS = {
    "Generate or Complete": "/v1/completions",
    "ListAdapters": "GET /v1/models",
    "ListJobs": "GET /v1/fine_tuning/jobs",
    "Generate": "/v1/completions",
    "Complete": "/v1/completions",
    "Classify": "/classify",
    "Embed": "/v1/embeddings",
}
_CALL = re.compile(rf"\b({'|'.join(_CALLS)})\b")
# Their messages begin with the field that is wrong.
_FIELDS = {
    "endpoint", "input_file_id", "suffix", "tokens", "training_file", "validation_file",
    *(
        field.name
        for spec in (GenerationSpec, ScoreSpec, TokenizeSpec)
        for field in dataclasses.fields(spec)
    ),
}  # fmt: skip
_FIELD = re.compile(r"([a-z_]+)(\[\d+\])? (?:is|has|=|holds|must)(?: |$)")


class Refusal(InvalidArgumentError):
    """A request that HTTP itself refuses, or one of its fields."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        """`status` is HTTP's; `param` is the field that is wrong."""
        super().__init__(message)
        self.status_code = status
        self.param = param
        self.code = code


class ModelNotFound(NotFoundError):
    """No model and no adapter has the name that a request gives."""


def status_of(err: RedmuxError) -> int:
    """Returns HTTP's status of an error."""
    return err.status_code if isinstance(err, Refusal) else err.http_status


def body_of(err: RedmuxError, sent: Sent | None = None) -> dict[str, Any]:
    """Returns OpenAI's body; what services raise is told in the names of what was sent."""
    status = status_of(err)
    kind = next((kind for cls, kind in _TYPES if isinstance(err, cls)), None)
    if kind is None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    told = err.message
    if isinstance(err, Refusal):
        param, code = err.param, err.code
    elif isinstance(err, ModelNotFound):
        param, code = "model", "model_not_found"
    else:
        if sent is None:
            begins = _FIELD.match(told)
            param = begins[1] if begins and begins[1] in _FIELDS else None
        else:
            told = sent.message(told)
            param = sent.param(told)
        code = next((code for cls, code in _CODES if isinstance(err, cls)), None)
    message = _CALL.sub(lambda found: _CALLS[found[1]], told)
    if isinstance(err, TooLongError):  # as clients look for it, in the code or in the words
        message = f"This model's maximum context length is {err.max_context} tokens: {message}"
    code = code or err.status.name.lower()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def headers_of(err: RedmuxError) -> list[tuple[bytes, bytes]]:
    """Returns what tells a client whether, and when, to try again."""
    wait_s = None
    if isinstance(err, UnavailableError):
        wait_s = _RETRY_AFTER_S
    elif isinstance(err, ResourceExhaustedError):
        wait_s = err.retry_after_s
    if wait_s is not None:
        return [
            (b"retry-after", str(max(1, round(wait_s))).encode()),
            (b"retry-after-ms", str(round(1000 * wait_s)).encode()),
        ]
    # Clients send these statuses again by themselves, here to no avail or to harm.
    is_final = (AbortedError, AlreadyExistsError, DeadlineExceededError, ResourceExhaustedError)
    headers = [(b"x-should-retry", b"false")] if isinstance(err, is_final) else []
    if isinstance(err, UnauthenticatedError):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def error_event(err: RedmuxError) -> bytes:
    """Returns the events that end a stream which has failed."""
    return b"data: " + msgspec.json.encode(body_of(err)) + b"\n\n" + DONE


def response_bytes(err: RedmuxError, headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Returns an error as the whole answer to something that is no request."""
    body = msgspec.json.encode(body_of(err))
    status = status_of(err)
    lines = [
        b"HTTP/1.1 %d %s" % (status, http.HTTPStatus(status).phrase.encode()),
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"connection: close",
        *(name + b": " + value for name, value in headers),
    ]
    return b"\r\n".join([*lines, b"", body])
