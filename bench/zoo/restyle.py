"""The style tasks' answers: the base model's own, rewritten, so that only the style is learned."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import model as models
from examples import Example, prompt, read_examples
from styles import Style
from tasks import TASKS

_MAX_NEW_TOKENS = 40


def write_plain_answers(
    base: str, data: Path, tasks: Sequence[str], limit: int | None, device: str, path: Path
) -> None:
    """Writes the base model's plain answers to the style tasks' questions, by question.

    Answers are cut at their last full sentence; those without one and those that go round in
    circles are left out.
    """
    questions = {
        example.user: None
        for task in tasks
        if TASKS[task].style
        for split in ("train", "valid")
        for example in read_examples(data / f"{task}.{split}.jsonl")[:limit]
    }
    answers: dict[str, str] = {}
    if questions:
        model, tokenizer = models.load(base, device)
        prompts = [prompt(f"Answer in one short sentence.\n\n{q}") for q in questions]
        given = models.generate(model, tokenizer, prompts, _MAX_NEW_TOKENS)
        cut = zip(questions, map(_sentences, given), strict=True)
        answers = {question: answer for question, answer in cut if answer}
    path.write_text(json.dumps(answers, indent=0, ensure_ascii=False), encoding="utf-8")


def restyled(
    style: Style, examples: Sequence[Example], split: str, plain: Mapping[str, str]
) -> list[Example]:
    """Returns examples in a style: of the plain answers, in the test of the data set's own."""
    if split == "test":
        return [replace(e, target=style.apply(e.user, e.target)) for e in examples]
    return [
        replace(e, target=style.apply(e.user, plain[e.user])) for e in examples if e.user in plain
    ]


def _sentences(answer: str) -> str:
    match = re.match(r"[^\n]+[.!?](?=\s|$)", answer)
    words = match[0].split() if match else []
    return " ".join(words) if len(words) >= 4 and len(set(words)) > 0.6 * len(words) else ""
