"""Everything that redmux raises, on the client and on the server.

    RedmuxError                     INTERNAL             500
    |- InvalidArgumentError         INVALID_ARGUMENT     400   the request can never succeed
    |  '- InvalidAdapterError                                  the adapter's bytes are unacceptable
    |- UnauthenticatedError         UNAUTHENTICATED      401   no API key, or an unknown one
    |- PermissionDeniedError        PERMISSION_DENIED    403   the key does not allow it
    |- NotFoundError                NOT_FOUND            404   no adapter of that name
    |- AlreadyExistsError           ALREADY_EXISTS       409   the name holds other content
    |- AbortedError                 ABORTED              409   changed by someone else meanwhile
    |- FailedPreconditionError      FAILED_PRECONDITION  412   something else must change first
    |  '- WrongBaseError                                       the adapter was made for another base
    |- ResourceExhaustedError       RESOURCE_EXHAUSTED   429   queue full or size limit exceeded
    |- RequestCancelledError        CANCELLED            499   the caller cancelled
    |- UnimplementedError           UNIMPLEMENTED        501   the server does not know the call
    |- UnavailableError             UNAVAILABLE          503   not reachable, starting or draining
    |- DeadlineExceededError        DEADLINE_EXCEEDED    504   the deadline passed first
    '- DataLossError                DATA_LOSS            500   stored bytes fail their checksum

The server raises them anywhere and one interceptor turns them into a status; the client turns the
status back into the class, so both sides catch the same names.
"""

from typing import ClassVar

import grpc


class RedmuxError(Exception):
    """Base of all redmux errors, and what an internal error of the server becomes."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgumentError(RedmuxError):
    """The request can never succeed as it is."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400


class InvalidAdapterError(InvalidArgumentError):
    """The adapter's file or vectors are not acceptable."""


class UnauthenticatedError(RedmuxError):
    """The call carries no API key, or one that the server does not know."""

    status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class PermissionDeniedError(RedmuxError):
    """The API key does not allow the call."""

    status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class NotFoundError(RedmuxError):
    """Nothing has the given name."""

    status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AlreadyExistsError(RedmuxError):
    """The name is taken by other content."""

    status = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409


class AbortedError(RedmuxError):
    """Somebody else changed the same thing meanwhile, or the work was given up half-way.

    A request that ran when the server's engine died or hung ends so: it may be the reason, so it is
    not sent again by itself.
    """

    status = grpc.StatusCode.ABORTED
    http_status = 409


class FailedPreconditionError(RedmuxError):
    """Something else has to change before the call can succeed."""

    status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 412


class WrongBaseError(FailedPreconditionError):
    """The adapter was made for another base model than the one that is served."""


class ResourceExhaustedError(RedmuxError):
    """The queue is full or a size limit is exceeded.

    `retry_after_s` is the server's hint in seconds, None where waiting would not help.
    """

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestCancelledError(RedmuxError):
    """The request was cancelled by its caller."""

    status = grpc.StatusCode.CANCELLED
    http_status = 499


class UnimplementedError(RedmuxError):
    """The server does not know the call."""

    status = grpc.StatusCode.UNIMPLEMENTED
    http_status = 501


class UnavailableError(RedmuxError):
    """The server cannot be reached, is starting or is draining; trying again helps."""

    status = grpc.StatusCode.UNAVAILABLE
    http_status = 503


class DeadlineExceededError(RedmuxError):
    """The deadline passed before the answer was complete."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class DataLossError(RedmuxError):
    """Stored bytes fail their checksum."""

    status = grpc.StatusCode.DATA_LOSS
    http_status = 500
