"""The part without training: what the base model does when it is told, and when it is shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import model as models
from examples import Example, few_shot_prompt
from plan import Part, Plan
from tasks import TASKS

NUM_SHOTS = 3
_VALID = 48  # held-out examples by which the form of the prompt is chosen
_STYLES = ("turns", "text")  # of the prompt


def base(plan: Plan, part: Part) -> None:
    """Scores the base model with an instruction, and with 3 shots in the best of several forms."""
    loaded = models.load(plan.base, plan.device)
    for name in plan.tasks:
        part.base[name] = {"forms": {}}
        _score(plan, part, name, loaded, part.base[name])
        print(name, part.base[name], flush=True)


def _score(plan: Plan, part: Part, name: str, loaded: tuple[Any, Any], row: dict[str, Any]) -> None:
    task = TASKS[name]
    test, valid = plan.examples(name, "test"), plan.examples(name, "valid")[:_VALID]
    row["n"] = len(test)
    choices = choose_shots(plan.examples(name, "train"))

    def answers(
        examples: Sequence[Example], style: str, shots: Sequence[Example], by_likelihood: bool
    ) -> list[str]:
        prompts = [few_shot_prompt(task.instruction, shots, e.user, style) for e in examples]
        if by_likelihood:
            return models.likeliest(*loaded, prompts, task.labels)
        return models.generate(*loaded, prompts, plan.answer_tokens(name))

    outputs = answers(test, "turns", (), False)
    row["zero_shot"] = task.score(test, outputs)
    part.keep_outputs(name, "base, zero-shot", outputs)
    if task.labels:
        row["zero_shot_likelihood"] = task.score(test, answers(test, "turns", (), True))
    part.save()
    forms = {
        ("likeliest label, " if by_likelihood else "") + f"{style}, {chosen} shots": (
            style, shots, by_likelihood,
        )
        for style in _STYLES
        for chosen, shots in choices.items()
        for by_likelihood in ((False, True) if task.labels else (False,))
    }  # fmt: skip
    for form, how in forms.items():
        row["forms"][form] = task.score(valid, answers(valid, *how))[task.metric]
    row["form"] = max(row["forms"], key=row["forms"].__getitem__)
    outputs = answers(test, *forms[row["form"]])
    row["few_shot"] = task.score(test, outputs)
    part.keep_outputs(name, "base, 3 shots", outputs)
    part.save()


def choose_shots(train: Sequence[Example]) -> Mapping[str, list[Example]]:
    """Returns two choices of shots: examples with rich answers, and a mixture.

    The mixture has different answers, of which one is the shortest, such as {}.
    """
    seen = list({e.user: e for e in train[:60]}.values())
    rich = sorted(seen[:30], key=lambda e: len(e.target))[-NUM_SHOTS:]
    mixed = [min(seen, key=lambda e: len(e.target))]
    for example in seen:
        if len(mixed) < NUM_SHOTS and example.target not in {e.target for e in mixed}:
            mixed.append(example)
    return {"rich": rich, "mixed": mixed}
