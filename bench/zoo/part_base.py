"""The part without training: what the base model does when it is told, and when it is shown."""

from collections.abc import Callable, Sequence

import model as models
from examples import Example, few_shot_prompt
from plan import Part, Plan
from tasks import TASKS, Task

NUM_SHOTS = 3
_VALID = 48  # held-out examples by which the form of the prompt is chosen
_Form = tuple[str, str]  # style of the prompt, choice of the shots
LIKELIHOOD = "likeliest label, "


def base(plan: Plan, part: Part) -> None:
    """Scores the base model with an instruction, and with 3 shots in the best of several forms."""
    model, tokenizer = models.load(plan.base, plan.device)

    def answer(task: Task, prompts: list[str]) -> list[str]:
        max_new_tokens = min(task.max_new_tokens, plan.max_new_tokens)
        return models.generate(model, tokenizer, prompts, max_new_tokens)

    def label(task: Task, prompts: list[str]) -> list[str]:
        return models.likeliest(model, tokenizer, prompts, task.labels)

    for name in plan.tasks:
        task = TASKS[name]
        test, valid = plan.examples(name, "test"), plan.examples(name, "valid")[:_VALID]
        shots = choose_shots(plan.examples(name, "train"))
        part.base[name] = row = {"n": len(test), "forms": {}}
        prompts = [few_shot_prompt(task.instruction, (), e.user, "turns") for e in test]
        outputs = answer(task, prompts)
        row["zero_shot"] = task.score(test, outputs)
        part.keep_outputs(name, "base, zero-shot", outputs)
        if task.labels:
            row["zero_shot_likelihood"] = task.score(test, label(task, prompts))
        part.save()

        def run(call: _Call, form: _Form, examples: Sequence[Example]) -> list[str]:
            style, chosen = form
            return call(task, [  # noqa: B023 - called before the next task
                few_shot_prompt(task.instruction, shots[chosen], e.user, style)  # noqa: B023
                for e in examples
            ])  # fmt: skip

        calls: dict[str, tuple[_Call, _Form]] = {}
        for style in ("turns", "text"):
            for chosen in shots:
                calls[f"{style}, {chosen} shots"] = answer, (style, chosen)
                if task.labels:
                    calls[f"{LIKELIHOOD}{style}, {chosen} shots"] = label, (style, chosen)
        for form, (call, how) in calls.items():
            row["forms"][form] = task.score(valid, run(call, how, valid))[task.metric]
        best = max(row["forms"], key=row["forms"].__getitem__)
        call, how = calls[best]
        outputs = run(call, how, test)
        row["few_shot"], row["form"] = task.score(test, outputs), best
        part.keep_outputs(name, "base, 3 shots", outputs)
        part.save()
        print(name, row, flush=True)


_Call = Callable[[Task, list[str]], list[str]]


def choose_shots(train: Sequence[Example]) -> dict[str, list[Example]]:
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
