"""PaddedModel: any generating model as transformers has it, its examples padded to one length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bank import VectorBank
from .base import TrainingBase
from .examples import Example, edited_tokens


class Batch(NamedTuple):
    """Examples as a model of transformers takes them."""

    inputs: dict[str, Tensor]
    predicts: Tensor  # [batch, positions] bool: where an answer's token is predicted
    edited: Tensor | None = None  # [batch, positions] bool; None is everywhere


class PaddedModel:
    """Runs examples through a causal or encoder-decoder model, edited by a bank's hooks."""

    pads = True

    def __init__(self, base: TrainingBase, bank: VectorBank, autocast: bool = False) -> None:
        self._model = base.model
        self._bank = bank
        self._autocast = autocast
        self._device = bank.values.device
        self._head: Any = base.model.get_output_embeddings()
        self._collate = _causal if base.kind == "causal" else self._seq2seq

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Returns the examples as rows, on the model's device."""
        inputs, predicts, edited = self._collate(examples)
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        if edited is not None:
            edited = edited.to(self._device)
        return Batch(moved, predicts.to(self._device), edited)

    def hidden(self, examples: Sequence[Example], adapters: Sequence[int]) -> Tensor:
        """Returns the output matrix's inputs [terms, hidden size], of one example after another."""
        batch = self.batch(examples)
        kept: list[Tensor] = []

        def take(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(args[0][batch.predicts])
            return (args[0][:, :0],)

        handle = self._head.register_forward_pre_hook(take)
        rows = torch.tensor(adapters, device=self._device)
        try:
            with self._bank.editing(rows, batch.edited), precision(self._device, self._autocast):
                self._model(**batch.inputs, use_cache=False)
        finally:
            handle.remove()
        return kept[0]

    def _seq2seq(self, examples: Sequence[Example]) -> Batch:
        ids = padded([example.inputs for example in examples], 0)
        start = self._model.config.get_text_config().decoder_start_token_id
        decoder = padded([(start, *example.targets[:-1]) for example in examples], 0)
        lengths = torch.tensor([len(example.targets) for example in examples])
        inputs = {
            "input_ids": ids,
            "attention_mask": attention_mask(
                [len(example.inputs) for example in examples], ids.shape[1]
            ),
            "decoder_input_ids": decoder,
        }
        return Batch(inputs, torch.arange(decoder.shape[1])[None] < lengths[:, None])


def _causal(examples: Sequence[Example]) -> Batch:
    """Pads on the right, where causal attention never looks, so there is no mask."""
    sequences = [example.inputs + example.targets for example in examples]
    ids = padded([sequence[:-1] for sequence in sequences], 0)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        predicts[row, len(example.inputs) - 1 : example.length - 1] = True
    edited = edited_tokens(examples, [ids.shape[1]] * len(examples))
    return Batch({"input_ids": ids}, predicts, None if edited is None else torch.stack(edited))


def precision(device: torch.device, autocast: bool) -> torch.autocast:
    """Returns the context in which the base computes, its products in bf16 if `autocast`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=autocast)


def padded(sequences: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Returns the sequences as one matrix [rows, longest], padded on the right."""
    ids = torch.full((len(sequences), max(map(len, sequences))), pad)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids


def attention_mask(lengths: Sequence[int], width: int) -> Tensor:
    """Returns [rows, width]: 1 up to each row's length, 0 behind."""
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
