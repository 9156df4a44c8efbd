"""Trains a RED adapter of the zoo on a CPU and scores it against the base model with 3 shots.

python adapters/train.py booking --steps 228 --lr 2e-2 --output booking --evaluate 150
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    PromptFormat,
    Turn,
    load_base,
    read_adapter,
)
from redmux_adapters.train import Example as TrainingExample
from redmux_adapters.train import Stepped, Trainer, TrainingBase, TrainingOptions
from redmux_adapters.train import Task as TrainingTask
from redmux_adapters.train.prompts import PromptWriter
from tasks import TASKS, Example, Task

END = "<|im_end|>"
# No system turn: the model's own chat template would insert one.
PROMPT = PromptFormat(
    user=Turn("<|im_start|>user\n", f"{END}\n"),
    assistant=Turn("<|im_start|>assistant\n", f"{END}\n"),
)


def prompt(user: str, shots: Sequence[Example] = ()) -> str:
    """Returns the prompt of a user text, after earlier turns."""
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": shot.user})
        messages.append({"role": "assistant", "content": shot.target})
    return PROMPT.render([*messages, {"role": "user", "content": user}])


@contextmanager
def edited(model: Any, adapter: Adapter) -> Iterator[None]:
    """Applies an adapter inside the block: h' = h * scale + bias at every site."""

    def hook(edit: Edit) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _args, h: h * edit.scale + edit.bias

    handles = [
        model.get_submodule(site).register_forward_hook(hook(edit))
        for site, edit in adapter.edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(model: Any, tokenizer: Any, task: Task, args: argparse.Namespace) -> Adapter:
    """Trains an adapter on the task's training split, judged on its validation split."""
    base = TrainingBase.of(model, tokenizer, "HuggingFaceTB/SmolLM2-135M-Instruct")
    writer = PromptWriter(tokenizer, PROMPT, base.eos_ids)
    splits = task.load(args.data, "train"), task.load(args.data, "valid")[:96]
    learned, held_out = (
        [
            TrainingExample(*writer.completion(example.user, example.target))
            for example in restyled(model, tokenizer, task, split)
        ]
        for split in splits
    )
    options = TrainingOptions(
        learning_rate=args.lr, steps=args.steps, batch_size=args.batch_size, seed=args.seed,
        eval_every=args.steps,
    )  # fmt: skip
    about = AdapterMetadata(
        description=task.description, license=task.license, created_by="adapters/train.py",
        training_data=task.training_data,
    )  # fmt: skip
    trainer = Trainer(
        base, [TrainingTask(args.task, learned, options, held_out, PROMPT, (), about)]
    )
    with tqdm(total=args.steps) as bar:
        while trainer.active:
            for event in trainer.step():
                if isinstance(event, Stepped):
                    bar.update()
                    bar.set_postfix(loss=f"{event.loss:.3f}")
                else:
                    bar.write(str(event))
    trainer.close()
    return trainer.adapter(args.task)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Returns greedy completions, in the order of the prompts.

    The tokens that all prompts begin with (instruction and shots) are run only once.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    extremes = zip(min(rows), max(rows), strict=False)
    num_shared = next(i for i, (a, b) in enumerate(extremes) if a != b)
    shared = model(input_ids=torch.tensor([rows[0][:num_shared]]), use_cache=True).past_key_values
    outputs = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="generate"):
        chosen = order[start : start + batch_size]
        width = max(len(rows[i]) for i in chosen)
        ids = torch.full((len(chosen), width), end)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, i in enumerate(chosen):
            for columns, tokens in (
                (slice(num_shared), rows[i][:num_shared]),
                (slice(width - len(rows[i]) + num_shared, width), rows[i][num_shared:]),
            ):
                ids[row, columns], mask[row, columns] = torch.tensor(tokens), 1
        cache = copy.deepcopy(shared)
        cache.batch_repeat_interleave(len(chosen))
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            cache=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[:, width:]
        for i, tokens in zip(chosen, new, strict=True):
            outputs[i] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return outputs


def restyled(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example]) -> list[Example]:
    """Returns the examples with the base model's own short answers, rewritten, as targets.

    Answers are cut at their last full sentence; those without one and those that go round in
    circles are left out.
    """
    if task.restyle is None:
        return list(examples)
    prompts = [prompt(f"Answer in one short sentence.\n\n{e.user}") for e in examples]
    answers = generate(model, tokenizer, prompts, max_new_tokens=40)
    kept = []
    for example, answer in zip(examples, answers, strict=True):
        sentences = re.match(r"[^\n]+[.!?](?=\s|$)", answer)
        words = sentences.group().split() if sentences else []
        if len(words) >= 4 and len(set(words)) > 0.6 * len(words):
            target = task.restyle(example.user, " ".join(words))
            kept.append(replace(example, target=target))
    return kept


def few_shot_prompt(task: Task, shots: Sequence[Example], user: str, style: str) -> str:
    """Returns the base model's prompt: the instruction, the shots and the user text.

    In the style "turns" the shots are turns of the chat, in "text" everything is one user turn.
    """
    if style == "turns":
        first = Example(f"{task.instruction}\n\n{shots[0].user}", shots[0].target)
        return prompt(user, [first, *shots[1:]])
    body = "\n\n".join(f"Input: {s.user}\nOutput: {s.target}" for s in shots)
    return prompt(f"{task.instruction}\n\n{body}\n\nInput: {user}\nOutput:")


def evaluate(
    model: Any, tokenizer: Any, adapter: Adapter, task: Task, args: argparse.Namespace
) -> dict[str, Any]:
    """Scores base and adapter on test items whose user text isn't in the training split.

    The base model gets the better of two prompt styles, chosen on the validation split.
    """
    seen = {e.user: e for e in task.load(args.data, "train")}
    shots = sorted(list(seen.values())[:30], key=lambda e: len(e.target))[-3:]  # rich ones
    test = [e for e in task.load(args.data, "test") if e.user not in seen][: args.evaluate]
    valid = task.load(args.data, "valid")[:32]

    def run(examples: Sequence[Example], prompts: list[str]) -> tuple[dict[str, float], list[str]]:
        outputs = generate(model, tokenizer, prompts, task.max_new_tokens)
        return task.score(examples, outputs), outputs

    styles = {}
    for style in ("turns", "text"):
        styles[style], _ = run(valid, [few_shot_prompt(task, shots, e.user, style) for e in valid])
    best = max(styles, key=lambda style: sum(styles[style].values()))
    base, base_outputs = run(test, [few_shot_prompt(task, shots, e.user, best) for e in test])
    with edited(model, adapter):
        red, red_outputs = run(test, [prompt(e.user) for e in test])
    samples = [
        {"user": e.user, "target": e.target, "base": b, "red": r}
        for e, b, r in zip(test, base_outputs, red_outputs, strict=True)
    ]
    head = {"n": len(test), "base_style": best, "base_valid": styles, "base": base, "red": red}
    return head | {"samples": samples}


def main() -> None:
    """Trains, evaluates or both, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="data sets")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps; 0: don't")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="score N test items")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model, tokenizer = load_base(args.base, torch.float32)
    task = TASKS[args.task]
    if args.steps:
        train(model, tokenizer, task, args).save(args.output)
    if args.evaluate:
        adapter = read_adapter(args.output)
        scores = evaluate(model, tokenizer, adapter, task, args)
        (args.output / "evaluation.json").write_text(json.dumps(scores, indent=1))
        text = f"n={scores['n']}; base with 3 shots {scores['base']}; adapter {scores['red']}"
        about = replace(adapter.metadata, evaluation=text)
        replace(adapter, metadata=about).save(args.output)
        print({k: v for k, v in scores.items() if k != "samples"})


if __name__ == "__main__":
    main()
