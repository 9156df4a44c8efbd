"""Records become examples: token ids, and what has to come out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from redmux.errors import InvalidArgumentError
from redmux.training_data import Faults, Record

from ..format.strictjson import shown
from ..format.window import ALL, EVERYWHERE, edited_positions, marker_of
from .prompts import PromptWriter

# What a base model does: generates behind a prompt, maps one text to another, or labels a text.
Kind = Literal["causal", "seq2seq", "classifier"]
# The fields of a record by which its form is recognised, the first that fits.
_FORMS = (("messages",), ("prompt", "completion"), ("text", "label"), ("text", "score"))
Form = tuple[str, ...]
_MEANINGS: dict[Kind, str] = {
    "causal": "a decoder", "seq2seq": "an encoder-decoder", "classifier": "an encoder",
}  # fmt: skip


class Example(NamedTuple):
    """One training example.

    `inputs` is the prompt, the encoder's text or the text to label; `targets` what has to be
    generated, with the end token; `label` the index of a class, or the score. `types` tells of each
    input token whether the first or the second of two texts holds it, for models that are told so;
    empty, all belong to the first. `edited` are the positions that the adapter edits.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...] = ()
    label: float = 0.0
    types: tuple[int, ...] = ()
    edited: range = EVERYWHERE

    @property
    def length(self) -> int:
        """Number of positions that the model computes for it."""
        return len(self.inputs) + len(self.targets)


def edited_tokens(examples: Sequence[Example], lengths: Sequence[int]) -> list[torch.Tensor] | None:
    """Returns which of each example's first tokens are edited, [length] of bool; None for all."""
    if all(example.edited == EVERYWHERE for example in examples):
        return None
    parts = []
    for example, length in zip(examples, lengths, strict=True):
        place = torch.arange(length)
        parts.append((place >= example.edited.start) & (place < example.edited.stop))
    return parts


def form_of(records: Sequence[Record]) -> Form:
    """Returns the field names that the first record is recognised by.

    Raises InvalidArgumentError where it has none of the known forms.
    """
    for form in _FORMS:
        if all(name in records[0].fields for name in form):
            return form
    known = "; ".join(" and ".join(form) for form in _FORMS)
    raise InvalidArgumentError(
        f"{records[0].where} has the fields {', '.join(map(str, records[0].fields))}; known are "
        f"{known} (--columns prompt=NAME,completion=NAME, or columns in a job file, renames)"
    )


def check_form(kind: Kind, form: Form) -> None:
    """Raises InvalidArgumentError unless data of this form trains a base model of this kind."""
    if (kind == "classifier") != (form[0] == "text"):
        right = "text and label or score" if kind == "classifier" else "prompt and completion"
        raise InvalidArgumentError(
            f"the data has {' and '.join(form)}; this base model is "
            f"{_MEANINGS[kind]}, which learns from {right}"
        )


def labels_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Returns the labels that occur, sorted: numbers by value, everything else as text."""
    labels = {str(record.fields["label"]) for record in records if "label" in record.fields}
    if all(label.isdigit() for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


class ExampleReader:
    """Turns records of one form into examples and notes what is wrong with them."""

    def __init__(
        self, kind: Kind, form: Form, writer: PromptWriter, max_length: int,
        labels: Sequence[str], apply: str = ALL,
    ) -> None:  # fmt: skip
        """`apply` is what the adapter edits; see `check_apply`."""
        self.form = form
        self._apply = apply
        self._marker = writer.bare(marker_of(apply) or "")
        self._kind = kind
        self._writer = writer
        self._max_length = max_length
        self._labels = {label: index for index, label in enumerate(labels)}
        read: dict[Form, Callable[[Mapping[str, Any]], Example]] = {
            ("messages",): self._read_messages,
            ("prompt", "completion"): self._read_completion,
            ("text", "label"): self._read_text,
            ("text", "score"): self._read_text,
        }
        self._read = read[form]

    def read(self, records: Iterable[Record], faults: Faults) -> list[Example]:
        """Returns the examples of the records that have no fault."""
        examples = []
        for record in records:
            try:
                example = self._read(record.fields)
                self._check_length(example)
                edited = edited_positions(self._apply, example.inputs, self._marker)
            except InvalidArgumentError as err:
                faults.add(record.where, err.message)
            else:
                examples.append(example._replace(edited=edited))
        return examples

    def _check_length(self, example: Example) -> None:
        parts = [example.length]
        if self._kind == "seq2seq":
            parts = [len(example.inputs), len(example.targets)]
        if max(parts) > self._max_length:
            raise InvalidArgumentError(
                f"too long: {max(parts)} tokens; limit max_length={self._max_length}"
            )
        if not example.inputs:
            raise InvalidArgumentError("the prompt has no tokens")

    def _read_messages(self, fields: Mapping[str, Any]) -> Example:
        messages = fields.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise InvalidArgumentError(
                f"messages is {shown(messages)}; it has to be a list of objects"
            )
        if self._kind == "seq2seq":
            raise InvalidArgumentError(
                "encoder-decoder models have no chat; give prompt and completion"
            )
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise InvalidArgumentError(
                "messages has to have a user's and, last, the assistant's message to learn"
            )
        answer = _text(messages[-1], "content")
        for message in messages[:-1]:
            _text(message, "content")
        return Example(*self._writer.chat(messages[:-1], answer))

    def _read_completion(self, fields: Mapping[str, Any]) -> Example:
        prompt, completion = _text(fields, "prompt"), _text(fields, "completion")
        pair = _text(fields, "prompt_pair") if fields.get("prompt_pair") is not None else None
        if self._kind == "seq2seq":
            return Example(*self._writer.pair(prompt, completion, pair))
        if pair is not None:
            raise InvalidArgumentError(
                "prompt_pair is for encoder-decoder models, which read two texts; write both into "
                "prompt"
            )
        return Example(*self._writer.completion(prompt, completion))

    def _read_text(self, fields: Mapping[str, Any]) -> Example:
        text = _text(fields, "text")
        pair = _text(fields, "text_pair") if fields.get("text_pair") is not None else None
        label = self._label(fields) if "label" in self.form else _score(fields)
        ids, types = self._writer.texts(text, pair)
        return Example(ids, label=label, types=types)

    def _label(self, fields: Mapping[str, Any]) -> int:
        label = fields.get("label")
        if label is None or label == "":
            raise InvalidArgumentError("label is missing or empty")
        index = self._labels.get(str(label))
        if index is None:
            names = ", ".join(list(self._labels)[:20])
            raise InvalidArgumentError(f"unknown label {shown(label)}; known are {names}")
        return index


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        found = shown(value) if name in fields else "missing"
        raise InvalidArgumentError(f"{name} is {found}; it has to be a text")
    if not value.strip():
        raise InvalidArgumentError(f"{name} is empty")
    return value


def _score(fields: Mapping[str, Any]) -> float:
    value = fields.get("score")
    try:
        score = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InvalidArgumentError(f"score is {shown(value)}; it has to be a finite number")
    return score
