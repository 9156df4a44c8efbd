"""Bodies of what is read instead of generated: embeddings, classes, scores, vectors."""

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from redmux_server.http_api.errors import Refusal
from redmux_server.http_api.schemas.body import Body, Unserved
from redmux_server.http_api.schemas.mix import MixBody
from redmux_server.http_api.schemas.prompts import SCHEMA, one_or_more
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


class EmbeddingBody(ReadingBody):
    """A request for vectors of inputs."""

    input: Inputs
    mix: MixBody | None = Field(None, description="Several adapters as one; see docs/adapters.md.")
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "cls", "last"] | None = None
    normalize: bool = True


class PoolingBody(EmbeddingBody):
    """A request for what the model makes of inputs: vectors as they are, or classes."""

    normalize: bool = False
    task: Literal["embed", "classify"] = "embed"


class ClassifyBody(ReadingBody):
    """A request for classes of inputs."""

    input: Inputs
    mix: MixBody | None = Field(None, description="Several adapters as one; see docs/adapters.md.")


Texts = Annotated[
    list[str],
    PlainValidator(lambda given: _texts(given)),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class ScoreBody(ReadingBody):
    """A request for scores of pairs: one text with each of others, or each with its own."""

    text_1: Texts
    text_2: Texts

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        """Takes the names that vLLM has for the same."""
        if not isinstance(data, dict):
            return data
        others = {"queries": "text_1", "documents": "text_2", "items": "text_2"}
        return {others.get(name, name): value for name, value in data.items()}

    @model_validator(mode="after")
    def _checked(self) -> "ScoreBody":
        if len(self.text_1) not in (1, len(self.text_2)):
            raise Refusal(
                f"text_1 has {len(self.text_1)} texts and text_2 has {len(self.text_2)}; give one, "
                "or as many", param="text_1",
            )  # fmt: skip
        return self

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
