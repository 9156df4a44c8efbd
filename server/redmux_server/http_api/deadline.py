"""Deadlines of answers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from redmux.errors import DeadlineExceededError


@contextlib.asynccontextmanager
async def within(timeout_s: float | None) -> AsyncGenerator[None]:
    """Raises DeadlineExceededError where the block takes longer."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise DeadlineExceededError(f"the answer was not complete within {timeout_s:g} s") from None
