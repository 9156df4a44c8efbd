"""Dataset: what a job learns, read from the lines of its files."""

from collections.abc import Mapping, Sequence
from typing import Any

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults, Record, read_lines
from redmux_server.training.check import MAX_RECORDS

_MOST_MESSAGES = 128  # of a line, which may be learned as half as many examples
_PLAIN = frozenset(("prompt", "prompt_pair", "completion", "text", "text_pair", "label", "score"))
_KINDS = {True: "a chat", False: "no chat"}
_MESSAGE = frozenset(("role", "content", "name", "weight"))


def read_dataset(name: str, data: bytes) -> list[Record]:
    """Returns the records of a file, each with its line as its place.

    A chat has one record for each message of the assistant whose weight is not 0: that one is
    learned, behind those before it. Raises InvalidArgumentError that lists unusable lines.
    """
    faults = Faults()
    records: list[Record] = []
    are_chats: bool | None = None
    for record in read_lines(name, data.splitlines(), faults):
        is_chat = "messages" in record.fields
        are_chats = is_chat if are_chats is None else are_chats
        try:
            made = _records(record)
            if is_chat != are_chats:
                raise InvalidArgumentError(
                    f"the line is {_KINDS[is_chat]}, those before it are {_KINDS[are_chats]}; a "
                    "file has lines of one kind"
                )
            records += made
        except InvalidArgumentError as err:
            faults.add(record.where, err.message)
        if len(records) > MAX_RECORDS:
            raise InvalidArgumentError(
                f"{record.where}: the lines up to here have {len(records)} answers to learn; the "
                f"limit is {MAX_RECORDS}"
            )
    faults.raise_any()
    if not records:
        raise InvalidArgumentError(f"{name} has no lines")
    return records


def _records(record: Record) -> Sequence[Record]:
    if "messages" not in record.fields:
        _check_fields(record.fields, _PLAIN, "the line")
        return [record]
    _check_fields(record.fields, frozenset(("messages",)), "the line")
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return [record]  # which training refuses in its own words
    if len(messages) > _MOST_MESSAGES:
        raise InvalidArgumentError(
            f"the chat has {len(messages)} messages, the limit is {_MOST_MESSAGES}"
        )
    weights = [_weight(index, message) for index, message in enumerate(messages)]
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    ends = [
        index for index, message in enumerate(plain)
        if index and message.get("role") == "assistant" and weights[index]
    ]  # fmt: skip
    if not ends:
        raise InvalidArgumentError(
            "messages has no message of the assistant, behind another one, to learn"
        )
    return [Record(record.where, {"messages": plain[: end + 1]}) for end in ends]


def _check_fields(fields: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = sorted(map(str, fields.keys() - known))
    if unknown:
        raise InvalidArgumentError(
            f"{what} has {', '.join(unknown)[:200]}, which training does not know; it learns from "
            "messages, or from prompt and completion"
        )


def _weight(index: int, message: Mapping[str, Any]) -> float:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise InvalidArgumentError(f"messages[{index}].weight is {weight!r:.80}, must be 0 or 1")
    return float(weight)


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message with its content as one text, and without its weight."""
    _check_fields(message, _MESSAGE, f"messages[{index}]")
    plain = {name: value for name, value in message.items() if name != "weight"}
    content = plain.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        plain["content"] = "".join(part["text"] for part in content)
    return plain
