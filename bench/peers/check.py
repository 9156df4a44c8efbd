"""Sees that an engine computes the model: greedy answers to one fixed prompt, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from peer import Peer, PeerError

# "The capital of France is" in SmolLM2's tokens.
PROMPT = [504, 3575, 282, 4649, 314]
TOKENS = 24
ADAPTERS = 3

Answers = dict[str, list[list[int]]]
"""The tokens of the base model, and those of the first adapters, asked in one batch."""


def fixed_answers(peer: Peer) -> Answers:
    """Returns the answers of one engine; raises PeerError where an adapter has no effect."""
    answers = {"base": peer.wave([PROMPT], TOKENS, [None]).token_ids}
    if "adapters" in peer.workloads:
        count = min(ADAPTERS, peer.limits.adapters)
        answers["adapters"] = peer.wave([PROMPT] * count, TOKENS, list(range(count))).token_ids
        rows = answers["base"] + answers["adapters"]
        if len(set(map(tuple, rows))) < len(rows):
            raise PeerError(f"{peer.name}: two of base and {count} adapters give the same tokens")
    return answers


def agreement(
    answers: Mapping[str, Answers], reference: str, lora: Sequence[str]
) -> dict[str, Any]:
    """Returns per engine how many leading tokens are those of a reference engine.

    Base rows are compared with `reference`, those with adapters of the engines in `lora` with the
    first of these, since redmux's are RED adapters.
    """
    result: dict[str, Any] = {"tokens": TOKENS, "reference": reference}
    for name, own in answers.items():
        row = {"base": leading(own["base"][0], answers[reference]["base"][0])}
        if name in lora:
            expected = answers[lora[0]]["adapters"]
            row[f"lora, against {lora[0]}"] = [
                leading(*pair) for pair in zip(own["adapters"], expected, strict=True)
            ]
        result[name] = row
    return result


def leading(a: list[int], b: list[int]) -> int:
    """Returns the length of the common prefix."""
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
