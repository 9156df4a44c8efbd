"""TooLongError: a prompt that the model's context cannot hold."""

from redmux.errors import InvalidArgumentError


class TooLongError(InvalidArgumentError):
    """A prompt, or what has to follow it, is longer than the context."""

    def __init__(self, message: str, max_context: int) -> None:
        """`max_context` is the length of the context in tokens."""
        super().__init__(message)
        self.max_context = max_context
