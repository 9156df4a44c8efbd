"""What callers are told of errors: their own in words, the server's by an id that is in its log."""

import logging
import secrets

from redmux.errors import RedmuxError

logger = logging.getLogger(__name__)


def told(err: Exception) -> RedmuxError:
    """Returns what the caller is told of an error, without the frames that raised it.

    One that is no RedmuxError is logged with its traceback, under the id that the caller sees.
    """
    if not isinstance(err, RedmuxError):
        error_id = secrets.token_hex(6)
        logger.error("internal error %s", error_id, exc_info=err)
        return RedmuxError(f"internal error, id {error_id}")
    err.__context__ = None
    return err.with_traceback(None)
