"""A base model that answers many prompts at once, and the likelihood of given answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from examples import END

from redmux_adapters import load_base
from redmux_bench.plain_model import greedy, left_padded

_BATCH_TOKENS = 100_000  # positions of a batch of prompts, padding included
_BATCH_ROWS = 256


def load(folder: str, device: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Returns (model, tokenizer), frozen; memory that a GPU has kept of an earlier one is freed."""
    if device == "cuda":
        torch.cuda.empty_cache()
    model, tokenizer = load_base(folder, getattr(torch, dtype))
    return model.to(device), tokenizer


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Returns greedy completions, in the order of the prompts."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    outputs = [""] * len(ids)
    for chosen in _batches([len(row) + max_new_tokens for row in ids]):
        answers = greedy(model, [ids[i] for i in chosen], max_new_tokens, end)
        for i, answer in zip(chosen, answers, strict=True):
            outputs[i] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return outputs


@torch.no_grad()
def likeliest(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> list[str]:
    """Returns for each prompt the answer, with its end token, that the model finds likeliest."""
    pairs = []
    for prompt in prompts:
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for answer in answers:
            pairs.append((start, tokenizer(answer + END, add_special_tokens=False)["input_ids"]))
    totals = torch.zeros(len(pairs))
    for chosen in _batches([len(start) + len(answer) for start, answer in pairs]):
        rows = left_padded([pairs[i][0] + pairs[i][1] for i in chosen])
        tokens, mask = (tensor.to(model.device) for tensor in rows)
        kept = max(len(pairs[i][1]) for i in chosen)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False,
            logits_to_keep=kept + 1,
        ).logits[:, :-1]  # fmt: skip
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, -kept:].flatten(), reduction="none"
        ).view(len(chosen), kept)
        lengths = torch.tensor([len(pairs[i][1]) for i in chosen], device=losses.device)
        answered = torch.arange(kept, device=losses.device)[None] >= kept - lengths[:, None]
        totals[torch.tensor(chosen)] = (-losses * answered).sum(1).cpu()
    best = totals.view(len(prompts), len(answers)).argmax(1)
    return [answers[int(i)] for i in best]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the numbers of rows that go together, longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (
            len(batch) == _BATCH_ROWS or (len(batch) + 1) * lengths[batch[0]] > _BATCH_TOKENS
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
