"""Bodies of what is read instead of generated: embeddings, classes, scores, vectors."""

import base64
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, PlainValidator, WithJsonSchema, model_validator

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Unserved
from redmux_server.http_api.schemas.mix import MixBody
from redmux_server.http_api.schemas.prompts import SCHEMA, one_or_more
from redmux_server.http_api.sent import first_sent
from redmux_server.services.validation import MAX_PRIORITY

_UNSERVED: Unserved = {
    "dimensions": ((), "a vector has as many values as the model has; a part of it means nothing"),
    "truncate_prompt_tokens": ((), "inputs are never cut; send a shorter one"),
    "messages": ((), "send texts as input"),
    "add_special_tokens": ((True,), "send token ids to say what an input begins with"),
    "input_type": ((), "write the instruction into the input"),
    "mm_processor_kwargs": ((), "inputs are texts"),
    "activation": ((True,), "redmux.logits has what is before it"),
    "use_activation": ((True,), "redmux.logits has what is before it"),
    "softmax": ((True,), "redmux.logits has what is before it"),
    "embed_dtype": (("float32",), "values are float32"),
    "endianness": (("native", "little"), "base64 is of little-endian values"),
}

Inputs = Annotated[
    list[str | list[int]],
    PlainValidator(lambda given: one_or_more(given, "input")),
    WithJsonSchema(SCHEMA),
]


class ReadingBody(Body):
    """What all of them have."""

    no_effect = frozenset(("user", "metadata", "store", "request_id"))
    unserved: ClassVar[Unserved] = _UNSERVED
    model: str
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    timeout: float | None = Field(None, gt=0, description="Seconds.", allow_inf_nan=False)


class InputBody(ReadingBody):
    """What those of inputs have."""

    input: Inputs
    mix: MixBody | None = Field(None, description="Several adapters as one; see docs/adapters.md.")

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        yield from super().renamed(given)
        yield r"^the request has (\d+) inputs\b", r"input has \1 inputs"
        several = given.get("input")
        is_list = isinstance(several, list) and not all(type(item) is int for item in several)
        yield r"^inputs\[(\d+)\](?:\.token_ids)?", r"input[\1]" if is_list else "input"


class EmbeddingBody(InputBody):
    """A request for vectors of inputs."""

    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool = True


class PoolingBody(EmbeddingBody):
    """A request for what the model makes of inputs: vectors as they are, or classes."""

    normalize: bool = False
    task: Literal["embed", "classify"] = "embed"


class ClassifyBody(InputBody):
    """A request for classes of inputs."""


Texts = Annotated[
    list[str],
    PlainValidator(lambda given: _texts(given)),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


_FIRST, _SECOND = ("text_1", "queries"), ("text_2", "documents", "items")  # as vLLM calls them, too


class ScoreBody(ReadingBody):
    """A request for scores of pairs: one text with each of others, or each with its own."""

    text_1: Texts = Field(validation_alias=AliasChoices(*_FIRST))
    text_2: Texts = Field(validation_alias=AliasChoices(*_SECOND))

    @classmethod
    def renamed(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """See Body."""
        first, second = first_sent(given, _FIRST), first_sent(given, _SECOND)
        yield r"^inputs\[\d+\](?:\.token_ids)?", f"{first} or {second}"

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, data: Any, handler: Callable[[Any], "ScoreBody"]) -> "ScoreBody":
        given = data if isinstance(data, dict) else {}
        for names in (_FIRST, _SECOND):
            same = [name for name in names if given.get(name) is not None]
            if len(same) > 1:
                raise Refusal(f"{' and '.join(same)} are the same; give one", param=same[1])
        body = handler(data)
        if len(body.text_1) not in (1, len(body.text_2)):
            first, second = first_sent(given, _FIRST), first_sent(given, _SECOND)
            raise Refusal(
                f"{first} has {len(body.text_1)} texts and {second} has {len(body.text_2)}; give "
                "one, or as many", param=first,
            )  # fmt: skip
        return body

    def pairs(self) -> list[tuple[str, str]]:
        """Returns what is to be scored."""
        firsts = self.text_1 * len(self.text_2) if len(self.text_1) == 1 else self.text_1
        return list(zip(firsts, self.text_2, strict=True))


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or set(map(type, texts)) != {str}:
        raise ValueError("must be a text or a list of texts")
    return texts


def encoded(values: Sequence[float], encoding: str) -> Sequence[float] | str:
    """Returns a vector as it is asked for; base64 is of little-endian float32."""
    if encoding == "float":
        return values
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()
