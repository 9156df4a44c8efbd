"""How long a request may be so that a packed step computes what the plain model computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redmux_server.models.kvcache import LayerRule

_NO_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """The most tokens of a request, and why."""

    num_tokens: int
    reason: str


def context_limit(config: Any, rules: Sequence[LayerRule]) -> ContextLimit:
    """Returns the limit of a model of this configuration whose attention has these rules.

    The start-up check runs short prompts. What changes only past a length that it does not reach
    is known from the configuration, and a request ends before it.
    """
    config = config.get_text_config()
    return min(_limits(config, rules), key=lambda limit: limit.num_tokens)


def longest_alike(config: Any) -> int:
    """Returns the most tokens up to which nothing changes, whatever attention's rules are."""
    return min(limit.num_tokens for limit in _told(config.get_text_config()))


def _limits(config: Any, rules: Sequence[LayerRule]) -> Iterator[ContextLimit]:
    yield from _told(config)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    is_used = kinds is None or any(kind != "full_attention" for kind in kinds)
    if window and is_used and not any(rule.window for rule in rules):
        # Or the model has it in its attention mask only, which a packed step does not have.
        yield ContextLimit(int(window), "the model does not tell its attention of its window")


def _told(config: Any) -> Iterator[ContextLimit]:
    positions = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    yield ContextLimit(int(positions), "the model's positions end there")
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original:
            # All positions of a step have other frequencies once one of them is past it, also
            # those of other requests and of keys that are in the cache.
            yield ContextLimit(int(original), "longrope changes all positions beyond it")
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk:
        yield ContextLimit(int(chunk), "the model's attention in chunks of that size is not known")


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the rotary parameters, which are one mapping or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, Mapping))
