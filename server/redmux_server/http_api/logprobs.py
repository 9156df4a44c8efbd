"""Log-probabilities in the two shapes of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from redmux_server.models.token_bytes import TokenBytes

_LEAST = -9999.0  # in place of minus infinity, which JSON lacks

Top = Sequence[tuple[int, float]]


class TokenNames:
    """What tokens are called in answers."""

    def __init__(self, tokens: TokenBytes, as_ids: bool) -> None:
        """With `as_ids` a token is called `token_id:7`, which no two share."""
        self._tokens = tokens
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """Returns the name of a token: its text, unless asked otherwise."""
        return f"token_id:{token_id}" if self._as_ids else self._tokens.of(token_id)[0]

    def text(self, token_id: int) -> str:
        """Returns the text of a token."""
        return self._tokens.of(token_id)[0]

    def in_chat(self, token_id: int, logprob: float) -> dict[str, Any]:
        """Returns a token as chats have it."""
        return {
            "token": self.name(token_id),
            "bytes": list(self._tokens.of(token_id)[1]),
            "logprob": _finite(logprob),
        }


class CompletionLogprobs:
    """The log-probabilities of one choice of a completion, as they come."""

    def __init__(self, names: TokenNames, num_top: int) -> None:
        """`num_top` alternatives are told of each token."""
        self._names = names
        self._num_top = num_top
        self._offset = 0  # characters, of the next token

    def take(
        self, token_ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Top]
    ) -> dict[str, Any]:
        """Returns the next tokens; a token without log-probability follows nothing."""
        offsets: list[int] = []
        best: list[dict[str, float] | None] = []
        for index, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            offsets.append(self._offset)
            self._offset += len(self._names.text(token_id))
            if logprob is None:
                best.append(None)
                continue
            top = tops[index][: self._num_top] if index < len(tops) else ()
            found: dict[str, float] = {}
            for other, value in (*top, (token_id, logprob)):
                # Of tokens that are called the same, the likeliest, which comes first.
                found.setdefault(self._names.name(other), _finite(value))
            best.append(found)
        return {
            "tokens": [self._names.name(token_id) for token_id in token_ids],
            "token_logprobs": [None if value is None else _finite(value) for value in logprobs],
            "top_logprobs": best if self._num_top else None,
            "text_offset": offsets,
        }


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[Top],
    num_top: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns the next tokens of a chat's answer."""
    content = []
    for index, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        top = tops[index][:num_top] if index < len(tops) else ()
        told = names.in_chat(token_id, logprob)
        told["top_logprobs"] = [names.in_chat(i, value) for i, value in top]
        content.append(told)
    return {"content": content, "refusal": None}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns what several `take`s of a choice come to."""
    whole: dict[str, Any] = {}
    for key in ("tokens", "token_logprobs", "text_offset"):
        whole[key] = [item for part in parts for item in part[key]]
    tops = [part["top_logprobs"] for part in parts]
    whole["top_logprobs"] = None if None in tops else [item for top in tops for item in top]
    return whole


def prompt_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[float | None],
    tops: Sequence[Top],
) -> list[dict[str, Any] | None]:  # fmt: skip
    """Returns the tokens of a prompt as vLLM tells them: by id, with their ranks."""
    told: list[dict[str, Any] | None] = []
    for token_id, logprob, top in zip(token_ids, logprobs, tops, strict=True):
        if logprob is None:
            told.append(None)
            continue
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(top, start=1)]
        found: dict[str, Any] = {}
        for i, value, rank in (*ranked, (token_id, logprob, None)):
            entry = {"logprob": _finite(value), "rank": rank, "decoded_token": names.text(i)}
            found.setdefault(str(i), entry)
        told.append(found)
    return told


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
