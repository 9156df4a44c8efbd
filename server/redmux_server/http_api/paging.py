"""Lists in OpenAI's shape, page by page."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from redmux_server.http_api.errors import Refusal


class Identified(Protocol):
    """Something with an id."""

    @property
    def id(self) -> str:
        """Its id."""


T = TypeVar("T", bound=Identified)


def page_of(
    items: Sequence[T], after: str | None, limit: int, told: Callable[[T], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the page behind the item whose id is `after`, in the order of `items`."""
    start = 0
    if after:
        ids = [item.id for item in items]
        if after not in ids:
            raise Refusal(f"after is {after[:80]!r}, which is not in the list", param="after")
        start = ids.index(after) + 1
    page = [told(item) for item in items[start : start + limit]]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > start + limit,
    }
