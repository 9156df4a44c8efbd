"""Example: a user text with the answer to learn; how examples are kept and shown to a model."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from redmux_adapters import PromptFormat, Turn

END = "<|im_end|>"
# No system turn: the model's own chat template would insert one.
PROMPT = PromptFormat(
    user=Turn("<|im_start|>user\n", f"{END}\n"),
    assistant=Turn("<|im_start|>assistant\n", f"{END}\n"),
)
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """One user text with the answer to learn; `references` holds every accepted answer."""

    user: str
    target: str
    references: tuple[str, ...] = ()


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Writes one JSON object per line."""
    lines = [json.dumps(asdict(example), ensure_ascii=False) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_examples(path: Path) -> list[Example]:
    """Reads what `write_examples` wrote."""
    values = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Example(v["user"], v["target"], tuple(v["references"])) for v in values]


def prompt(user: str, shots: Sequence[Example] = ()) -> str:
    """Returns the prompt of a user text, after earlier turns."""
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": shot.user})
        messages.append({"role": "assistant", "content": shot.target})
    return PROMPT.render([*messages, {"role": "user", "content": user}])


def few_shot_prompt(instruction: str, shots: Sequence[Example], user: str, style: str) -> str:
    """Returns the base model's prompt: an instruction, maybe some shots, and the user text.

    In the style "turns" the shots are turns of the chat, in "text" everything is one user turn.
    """
    if not shots:
        return prompt(f"{instruction}\n\n{user}")
    if style == "turns":
        first = Example(f"{instruction}\n\n{shots[0].user}", shots[0].target)
        return prompt(user, [first, *shots[1:]])
    body = "\n\n".join(f"Input: {s.user}\nOutput: {s.target}" for s in shots)
    return prompt(f"{instruction}\n\n{body}\n\nInput: {user}\nOutput:")
