"""The style tasks' answers: the base model's own, rewritten, so that only the style is learned."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import model as models
from examples import Example, prompt, read_examples
from styles import Style
from tasks import TASKS

_MAX_NEW_TOKENS = 40


def style_questions(data: Path, tasks: Sequence[str]) -> dict[str, str]:
    """Returns the style tasks' questions with the answers that the data set has."""
    return {
        example.user: example.target
        for task in tasks
        if TASKS[task].style
        for split in ("train", "valid")
        for example in read_examples(data / f"{task}.{split}.jsonl")
    }


def plain_answers(base: str, questions: Sequence[str], device: str) -> dict[str, str]:
    """Returns the base model's own short answers, by question.

    They are cut at their last full sentence; those without one and those that go round in circles
    are left out.
    """
    if not questions:
        return {}
    model, tokenizer = models.load(base, device)
    prompts = [prompt(f"Answer in one short sentence.\n\n{q}") for q in questions]
    given = models.generate(model, tokenizer, prompts, _MAX_NEW_TOKENS)
    cut = zip(questions, map(_sentences, given), strict=True)
    return {question: answer for question, answer in cut if answer}


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
