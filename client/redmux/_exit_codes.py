"""What a command ends with; docs/command.md has the same table."""

from redmux.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)

FAILED = 1  # what has no code of its own: an internal error, a file, a job or a check that failed
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
REFUSED = 5
INTERRUPTED = 130  # 128 + SIGINT, as shells tell it
BROKEN_PIPE = 141  # 128 + SIGPIPE

_CODES: dict[type[BaseException], int] = {
    UnavailableError: UNREACHABLE,
    DeadlineExceededError: UNREACHABLE,
    NotFoundError: NOT_FOUND,
    InvalidArgumentError: REFUSED,
    UnauthenticatedError: REFUSED,
    PermissionDeniedError: REFUSED,
    AlreadyExistsError: REFUSED,
    FailedPreconditionError: REFUSED,
    ResourceExhaustedError: REFUSED,
    UnimplementedError: REFUSED,
}


def exit_code(error: BaseException) -> int:
    """Returns the code of a command that ends with this error."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), FAILED)
