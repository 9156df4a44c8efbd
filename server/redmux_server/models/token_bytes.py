"""TokenBytes: single tokens as text and as the bytes that they stand for."""

import re
from collections.abc import Callable, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """What each token adds to a text, remembered once it was asked for; on one thread.

    A token that is part of a character has its own bytes, and the replacement character as text.
    """

    def __init__(
        self, tokenizer: Any, decode: Callable[[Sequence[int]], str], anchor: Sequence[int]
    ) -> None:
        """`decode` keeps special tokens; `anchor` are the ids of some text.

        Behind it a token is decoded: many tokenizers strip a blank from the beginning of a text.
        """
        self._tokenizer = tokenizer
        self._decode = decode
        self._anchor = list(anchor)
        self._num_before = len(decode(self._anchor))
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token_id: int) -> tuple[str, bytes]:
        """Returns the text and the bytes of a token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        text = self._decode([*self._anchor, token_id])[self._num_before :]
        if _REPLACEMENT not in text:
            return text, text.encode(errors="replace")
        name = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if byte := _BYTE.fullmatch(name):
            return text, bytes([int(byte[1], 16)])
        if name and all(char in _BYTE_OF for char in name):
            return text, bytes(_BYTE_OF[char] for char in name)
        return text, text.encode(errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte of each character by which byte-level tokenizers write bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + index): byte for index, byte in enumerate(hidden)
    }


_BYTE_OF = _byte_alphabet()
