"""Paths that are not there: what is near, or what this server has instead of them."""

from collections.abc import Iterable

from redmux._nearest import nearest
from redmux.errors import NotFoundError

_SHOWN = 256  # characters of a path
_NEAR = 3
# What other servers have there.
_INSTEAD = {
    "/load_lora_adapter_from_tensors": (
        "PUT the bytes of a safetensors file to /v1/adapters/{name}, or load one of the server's "
        "by POST /load_lora_adapter"
    ),
    "/generate": "use POST /v1/completions",
    "/v1/messages": "use POST /v1/chat/completions",
    "/rerank": "use POST /score",
    "/v1/rerank": "use POST /score",
}


def missing(path: str, known: Iterable[str]) -> NotFoundError:
    """Returns the error for a path, which names those of `known` that are like it."""
    instead = _INSTEAD.get(path)
    if instead is None:
        near = nearest(path, sorted(set(known)), _NEAR)
        instead = f"did you mean {' or '.join(near)}? /docs has all" if near else "see /docs"
    return NotFoundError(f"there is no {path[:_SHOWN]}; {instead}")
