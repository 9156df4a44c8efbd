"""Trains one RED adapter of the zoo on a CPU and scores it against the base model with 3 shots.

python adapters/train.py booking --minutes 12 --lr 2e-2 --output booking --evaluate 200
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from redmux_adapters.base import load_base
from tasks import TASKS, Example, Task

END = "<|im_end|>"
SITE = "model.layers.{}.mlp.down_proj"


def prompt(user: str, shots: Sequence[Example] = ()) -> str:
    """Returns the "turns" prompt of a user text, without a system turn."""
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return "".join(f"{turn.format(s.user)}{s.target}{END}\n" for s in shots) + turn.format(user)


class RedEdits(nn.Module):
    """The learned vectors, applied by a forward hook at every site: h' = h * scale + bias."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.sites = [SITE.format(i) for i in range(model.config.num_hidden_layers)]
        hidden = model.config.hidden_size
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in self.sites])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(hidden)) for _ in self.sites])
        self.active = True
        for index, site in enumerate(self.sites):
            model.get_submodule(site).register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Any:
        def edit(_module: nn.Module, _args: Any, h: Tensor) -> Tensor:
            return h * self.scales[index] + self.biases[index] if self.active else h

        return edit

    def vectors(self) -> dict[str, Tensor]:
        """Returns copies under the names of the adapter file."""
        named = {}
        for site, scale, bias in zip(self.sites, self.scales, self.biases, strict=True):
            named[f"{site}.scale"] = scale.detach().clone()
            named[f"{site}.bias"] = bias.detach().clone()
        return named

    def load(self, vectors: dict[str, Tensor]) -> None:
        """Copies the vectors of an adapter file in."""
        with torch.no_grad():
            for site, scale, bias in zip(self.sites, self.scales, self.biases, strict=True):
                scale.copy_(vectors[f"{site}.scale"])
                bias.copy_(vectors[f"{site}.bias"])


@dataclass(frozen=True)
class Tokens:
    """A training example as token ids; the first `num_prompt` of them carry no loss."""

    ids: list[int]
    num_prompt: int


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Tokens]:
    """Tokenizes prompt and target apart, as a server that appends to the prompt would."""
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

    Padding is on the right, where causal attention never looks, so there is no mask; the
    output matrix is applied to the positions that predict a target token only.
    """
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    predicts = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        predicts[row, example.num_prompt - 1 : len(example.ids) - 1] = True
    with torch.autocast("cpu", torch.bfloat16):
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
    layout = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=100, bar_format=layout) as bar:
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
    return {
        "steps": len(curve),
        "minutes": round((time.monotonic() - start) / 60, 2),
        "epochs": round(len(curve) * args.batch_size / len(data), 2),
        "final_loss": round(average, 4),
        "curve": curve,
    }


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Returns greedy completions, in the order of the prompts."""
    tokenizer.padding_side = "left"
    end = tokenizer.convert_tokens_to_ids(END)
    outputs = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="generate"):
        rows = order[start : start + batch_size]
        texts = [prompts[i] for i in rows]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        for i, row in zip(rows, tokens[:, inputs["input_ids"].shape[1] :], strict=True):
            outputs[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return outputs


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
    """Scores base and adapter on the test split.

    The base model gets the better of two prompt styles, chosen on the validation split.
    """
    train_split = task.load(args.data, "train")
    seen = {e.user: e for e in train_split}
    shots = [e for e in seen.values() if len(e.target) > 2][:3]
    test = [e for e in task.load(args.data, "test") if e.user not in seen][: args.evaluate]
    valid = task.load(args.data, "valid")[:48]

    def run(examples: Sequence[Example], prompts: list[str]) -> tuple[dict[str, float], list[str]]:
        outputs = generate(model, tokenizer, prompts, task.max_new_tokens)
        return task.score(examples, outputs), outputs

    edits.active = False
    styles = {}
    for style in ("turns", "text"):
        prompts = [few_shot_prompt(task, shots, e.user, style) for e in valid]
        styles[style] = run(valid, prompts)[0]
    best = max(styles, key=lambda s: sum(styles[s].values()))
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
    model.requires_grad_(False)
    edits, task = RedEdits(model), TASKS[args.task]
    args.output.mkdir(parents=True, exist_ok=True)
    weights, report = args.output / "adapter_model.safetensors", args.output / "training.json"
    if args.minutes or args.steps:
        run = train(model, edits, encode(tokenizer, task.load(args.data, "train")), args)
        valid = encode(tokenizer, task.load(args.data, "valid")[:96])
        with torch.no_grad():
            losses = [loss_of(model, valid[i : i + 16]) for i in range(0, len(valid), 16)]
        run["valid_loss"] = round(sum(float(x) for x in losses) / len(losses), 4)
        save_file(edits.vectors(), weights)
        report.write_text(json.dumps(run))
        print({k: v for k, v in run.items() if k != "curve"})
    if args.evaluate:
        edits.load(load_file(weights))
        scores = evaluate(model, tokenizer, edits, task, args)
        (args.output / "evaluation.json").write_text(json.dumps(scores, indent=1))
        print({k: v for k, v in scores.items() if k != "samples"})


if __name__ == "__main__":
    main()
