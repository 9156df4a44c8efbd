"""Trains a RED adapter of the zoo on a CPU and scores it against the base model with 3 shots.

python adapters/train.py booking --minutes 12 --lr 2e-2 --output booking --evaluate 150
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from redmux_adapters import (
    Adapter,
    AdapterMetadata,
    Edit,
    PromptFormat,
    Turn,
    ffn_sites,
    fingerprint,
    load_base,
    read_adapter,
)
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


class RedEdits(nn.Module):
    """The learned vectors, applied by a forward hook at every site: h' = h * scale + bias."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.sites = ffn_sites(model)
        self.scales = nn.ParameterList([torch.ones(dim) for dim in self.sites.values()])
        self.biases = nn.ParameterList([torch.zeros(dim) for dim in self.sites.values()])
        self.active = True
        for index, site in enumerate(self.sites):
            model.get_submodule(site).register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def edit(_module: nn.Module, _args: Any, h: Tensor) -> Tensor:
            return h * self.scales[index] + self.biases[index] if self.active else h

        return edit

    def edits(self) -> dict[str, Edit]:
        """Returns copies of the vectors by site."""
        vectors = zip(self.sites, self.scales, self.biases, strict=True)
        return {site: Edit(scale, bias) for site, scale, bias in vectors}

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Copies the vectors of an adapter in."""
        for index, site in enumerate(self.sites):
            self.scales[index].copy_(adapter.edits[site].scale)
            self.biases[index].copy_(adapter.edits[site].bias)


@dataclass(frozen=True)
class Tokens:
    """A training example as token ids; the first `num_prompt` of them carry no loss."""

    ids: list[int]
    num_prompt: int


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Tokens]:
    """Tokenizes prompt and target apart: a server generates after the prompt's own tokens."""
    encoded = []
    for example in examples:
        head = tokenizer(prompt(example.user), add_special_tokens=False)["input_ids"]
        tail = tokenizer(example.target + END, add_special_tokens=False)["input_ids"]
        encoded.append(Tokens(head + tail, len(head)))
    return encoded


def batches(examples: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Yields batches of similar length for ever, in a new order in every epoch."""
    order = list(examples)
    while True:
        random.shuffle(order)
        epoch = []
        for start in range(0, len(order), size * 32):
            pool = sorted(order[start : start + size * 32], key=lambda e: len(e.ids))
            epoch += [pool[i : i + size] for i in range(0, len(pool), size)]
        random.shuffle(epoch)
        yield from epoch


def loss_of(model: Any, batch: Sequence[Tokens]) -> Tensor:
    """Returns the mean cross-entropy over the target tokens.

    Padding is on the right, where causal attention never looks, so there is no mask; the output
    matrix is applied only at the positions that predict a target token.
    """
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    predicts = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        predicts[row, example.num_prompt - 1 : len(example.ids) - 1] = True
    with torch.autocast("cpu", torch.bfloat16):  # the vectors themselves stay fp32
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[predicts])
    return F.cross_entropy(logits.float(), ids.roll(-1, dims=1)[predicts])


def train(
    model: Any, edits: RedEdits, data: Sequence[Tokens], args: argparse.Namespace
) -> dict[str, Any]:
    """Trains the edits for a number of steps or minutes; the rate rises, then falls to zero."""
    optimizer = torch.optim.AdamW(edits.parameters(), lr=args.lr, weight_decay=0.0)
    curve: list[float] = []
    start, done, average = time.monotonic(), 0.0, 0.0
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for batch in batches(data, args.batch_size):
            minutes = (time.monotonic() - start) / 60
            done = len(curve) / args.steps if args.steps else minutes / args.minutes
            if done >= 1:
                break
            rate = args.lr * min(1.0, done / 0.06 + 0.02, (1 - done) / 0.94)
            optimizer.param_groups[0]["lr"] = rate
            loss = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(edits.parameters(), 1.0)
            optimizer.step()
            curve.append(round(loss.item(), 4))
            average = curve[0] if len(curve) == 1 else 0.95 * average + 0.05 * curve[-1]
            bar.n = round(100 * done, 1)
            bar.set_postfix(step=len(curve), loss=f"{average:.3f}")
    minutes, epochs = (time.monotonic() - start) / 60, len(curve) * args.batch_size / len(data)
    run = {"steps": len(curve), "minutes": round(minutes, 2), "epochs": round(epochs, 2)}
    return run | {"final_loss": round(average, 4), "curve": curve}


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
    model: Any, tokenizer: Any, edits: RedEdits, task: Task, args: argparse.Namespace
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

    edits.active = False
    styles = {}
    for style in ("turns", "text"):
        styles[style], _ = run(valid, [few_shot_prompt(task, shots, e.user, style) for e in valid])
    best = max(styles, key=lambda style: sum(styles[style].values()))
    base, base_outputs = run(test, [few_shot_prompt(task, shots, e.user, best) for e in test])
    edits.active = True
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
    parser.add_argument("--minutes", type=float, default=12.0, help="training time, 0 to skip it")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="score N test items")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model, tokenizer = load_base(args.base, torch.float32)
    edits, task = RedEdits(model), TASKS[args.task]
    if args.minutes or args.steps:
        splits = task.load(args.data, "train"), task.load(args.data, "valid")[:96]
        data, valid = (encode(tokenizer, restyled(model, tokenizer, task, s)) for s in splits)
        run = train(model, edits, data, args)
        with torch.no_grad():
            losses = [float(loss_of(model, valid[i : i + 16])) for i in range(0, len(valid), 16)]
        run["valid_loss"] = round(sum(losses) / len(losses), 4)
        about = AdapterMetadata(
            base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
            description=task.description,
            license=task.license,
            created_by="adapters/train.py",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            training_data=task.training_data,
            training=f"{run['steps']} steps of {args.batch_size}, AdamW, lr {args.lr:g}, warm-up "
            f"6 %, linear decay, clip 1.0, seed {args.seed}, {run['minutes']} minutes",
        )
        Adapter(fingerprint(model), edits.edits(), PROMPT, about).save(args.output)
        (args.output / "training.json").write_text(json.dumps(run))
        print({k: v for k, v in run.items() if k != "curve"})
    if args.evaluate:
        adapter = read_adapter(args.output)
        edits.load(adapter)
        scores = evaluate(model, tokenizer, edits, task, args)
        (args.output / "evaluation.json").write_text(json.dumps(scores, indent=1))
        text = f"n={scores['n']}; base with 3 shots {scores['base']}; adapter {scores['red']}"
        about = replace(adapter.metadata, evaluation=text)
        replace(adapter, metadata=about).save(args.output)
        print({k: v for k, v in scores.items() if k != "samples"})


if __name__ == "__main__":
    main()
