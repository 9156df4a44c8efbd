"""transformers' own model, edited by hand: what other ways to compute are compared with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from redmux_adapters import Edit


@contextmanager
def edited(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Edits the outputs of the named modules inside the block."""

    def hook(edit: Edit) -> Any:
        scale, bias = edit.scale.to(model.device), edit.bias.to(model.device)
        return lambda module, args, h: (h * scale + bias).to(h.dtype)

    handles = [
        model.get_submodule(site).register_forward_hook(hook(edit)) for site, edit in edits.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Returns ids [rows, longest] that end together, and the mask that is 0 before them."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, end: int
) -> list[list[int]]:
    """Returns the likeliest tokens after each prompt, up to its `end` token if one comes."""
    ids, mask = (tensor.to(model.device) for tensor in left_padded(prompts, end))
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=end, pad_token_id=end,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    return [row[: row.index(end) + 1] if end in row else row for row in new]
