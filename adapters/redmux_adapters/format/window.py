"""Which positions of a sequence an adapter edits."""

import sys
from collections.abc import Sequence

from redmux.errors import InvalidAdapterError, InvalidArgumentError

from .strictjson import require_text, shown

ALL = "all"
PROMPT = "prompt"
GENERATION = "generation"
AFTER = "after:"  # and the text of a marker behind it
EVERYWHERE = range(sys.maxsize)
MAX_MARKER_CHARS = 256


def is_apply(text: str) -> bool:
    """Whether `text` says where an adapter edits, as in `check_apply`."""
    return text in (ALL, PROMPT, GENERATION) or 0 < len(marker_of(text) or "") <= MAX_MARKER_CHARS


def check_apply(text: object) -> str:
    """Returns `text` if it says where an adapter edits, else raises InvalidAdapterError.

    "all" is every token, "prompt" those of the prompt, "generation" those from the prompt's last
    one on, whose output is the first token that is generated; "after:TEXT" those from the last
    token of the first TEXT in the prompt on.
    """
    apply = require_text(text, "apply", len(AFTER) + MAX_MARKER_CHARS)
    if not is_apply(apply):
        raise InvalidAdapterError(
            f'apply is {shown(apply)}; it has to be "{ALL}", "{PROMPT}", "{GENERATION}" or '
            f'"{AFTER}TEXT"'
        )
    return apply


def marker_of(apply: str) -> str | None:
    """Returns the text behind which an adapter edits, None where it is no such text."""
    return apply[len(AFTER) :] if apply.startswith(AFTER) else None


def edited_positions(
    apply: str, prompt_ids: Sequence[int], marker_ids: Sequence[int] = ()
) -> range:
    """Returns the positions, counted from the prompt's first token, that are edited.

    `marker_ids` is the marker of `apply`, if there is one; InvalidArgumentError is raised where the
    prompt does not hold it.
    """
    if apply == ALL:
        return EVERYWHERE
    if apply == PROMPT:
        return range(len(prompt_ids))
    if apply == GENERATION:
        return range(len(prompt_ids) - 1, EVERYWHERE.stop)
    return range(_end_of(marker_ids, prompt_ids, apply) - 1, EVERYWHERE.stop)


def _end_of(marker: Sequence[int], ids: Sequence[int], apply: str) -> int:
    wanted, size = list(marker), len(marker)
    for start, first in enumerate(ids):
        if wanted and first == wanted[0] and list(ids[start : start + size]) == wanted:
            return start + size
    raise InvalidArgumentError(
        f"the prompt does not hold the tokens of {shown(marker_of(apply))}, behind which the "
        "adapter edits; write that text into the prompt, special tokens as such"
    )
