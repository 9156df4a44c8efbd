"""A base model that answers many prompts at once, and the likelihood of given answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from examples import END
from torch import Tensor

from redmux_adapters import load_base

_BATCH_TOKENS = 100_000  # positions of a batch of prompts, padding included
_BATCH_ROWS = 256
# Gets the numbers of the rows of a batch; what the model computes inside is edited for them.
Editing = Callable[[Sequence[int]], AbstractContextManager[None]]


def load(folder: str, device: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Returns (model, tokenizer), frozen."""
    model, tokenizer = load_base(folder, getattr(torch, dtype))
    return model.to(device), tokenizer


def no_edit(_rows: Sequence[int]) -> AbstractContextManager[None]:
    """Leaves the model as it is."""
    return nullcontext()


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int,
    editing: Editing = no_edit,
) -> list[str]:  # fmt: skip
    """Returns greedy completions, in the order of the prompts."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    outputs = [""] * len(ids)
    for chosen in _batches([len(row) + max_new_tokens for row in ids]):
        width = max(len(ids[i]) for i in chosen)
        tokens = torch.full((len(chosen), width), end)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, i in enumerate(chosen):
            tokens[row, width - len(ids[i]) :] = torch.tensor(ids[i])
            mask[row, width - len(ids[i]) :] = 1
        with editing(chosen):
            new = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        for i, row_ids in zip(chosen, new[:, width:].tolist(), strict=True):
            outputs[i] = tokenizer.decode(row_ids, skip_special_tokens=True).strip()
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
        rows = [pairs[i][0] + pairs[i][1] for i in chosen]
        width, kept = max(map(len, rows)), max(len(pairs[i][1]) for i in chosen)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for row, ids in enumerate(rows):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(rows):
            mask[row, width - len(ids) :] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False,
            logits_to_keep=kept + 1,
        ).logits[:, :-1]  # fmt: skip
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, -kept:].flatten(), reduction="none"
        ).view(len(rows), kept)
        lengths = torch.tensor([len(pairs[i][1]) for i in chosen], device=losses.device)
        answered = torch.arange(kept, device=losses.device)[None] >= kept - lengths[:, None]
        totals[torch.tensor(chosen)] = (-losses * answered).sum(1).cpu()
    best = totals.view(len(prompts), len(answers)).argmax(1)
    return [answers[int(i)] for i in best]


def edited_by(bank: Any, owners: Sequence[int]) -> Editing:
    """Returns the edits of a VectorBank, where `owners` are the adapters of all prompts."""

    @contextmanager
    def editing(rows: Sequence[int]) -> Iterator[None]:
        chosen: Tensor = torch.tensor([owners[i] for i in rows], device=bank.values.device)
        with bank.editing(chosen):
            yield

    return editing


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
