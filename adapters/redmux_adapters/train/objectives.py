"""What is minimised: the loss of a batch's rows, and its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redmux.errors import InvalidArgumentError

from .bank import VectorBank
from .base import TrainingBase
from .examples import Example

_CHUNK_VALUES = 1 << 25  # logits that are held at a time


@dataclass
class Row:
    """One example in a pass: whose it is, what its loss counts for, and what came out.

    `weight` is what each of its loss terms is multiplied by before the gradient is taken.
    """

    adapter: int  # row of the bank
    example: Example
    weight: float = 0.0
    smoothing: float = 0.0
    loss: float = field(default=0.0, init=False)  # sum over its terms, without smoothing
    num_right: int = field(default=0, init=False)  # terms whose most likely class is right
    predicted: float = field(default=0.0, init=False)  # class or score, of texts with a head


class _Batch(NamedTuple):
    inputs: dict[str, Tensor]
    predicts: Tensor  # [batch, positions] bool: where a loss term is
    targets: Tensor  # [terms]
    owners: Tensor  # [terms], row of the pass that each term belongs to


class GenerationObjective:
    """Cross-entropy of the answers' tokens, of causal and of encoder-decoder models.

    The output matrix is applied to the positions that predict an answer's token, a chunk at a time,
    so logits of a large vocabulary are never all in memory.
    """

    def __init__(self, base: TrainingBase, bank: VectorBank, autocast: bool = False) -> None:
        self._bank = bank
        self._autocast = autocast
        self._model = base.model
        self._device = bank.values.device
        self._head: Any = base.model.get_output_embeddings()
        self._logits = _logits_of(base.model)
        self._collate = self._causal if base.kind == "causal" else self._seq2seq
        self._check_logits()

    def run(self, rows: Sequence[Row], train: bool) -> None:
        """Computes the rows' losses and, if `train`, adds their gradients to the bank."""
        batch = self._collate([row.example for row in rows])
        adapters = torch.tensor([row.adapter for row in rows], device=self._device)
        with torch.set_grad_enabled(train), precision(self._device, self._autocast):
            hidden = self._hidden(batch, adapters)  # [terms, hidden size]
        leaf = hidden.detach().requires_grad_(train)
        weights = torch.tensor([row.weight for row in rows], device=self._device)[batch.owners]
        smooths = any(row.smoothing for row in rows)
        smoothing = torch.tensor([row.smoothing for row in rows], device=self._device)
        results = []
        size = max(1, _CHUNK_VALUES // self._head.weight.shape[0])
        for start in range(0, len(leaf), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(train):
                with precision(self._device, self._autocast):
                    # [terms of the chunk, vocabulary]
                    logits = self._logits(leaf[part]).float()
                losses = F.cross_entropy(logits, batch.targets[part], reduction="none")
                if train:
                    smoothed = losses
                    if smooths:
                        amounts = smoothing[batch.owners[part]]
                        uniform = logits.logsumexp(-1) - logits.mean(-1)
                        smoothed = (1 - amounts) * losses + amounts * uniform
                    (smoothed * weights[part]).sum().backward()  # type: ignore[no-untyped-call]
            results.append(
                torch.stack((losses.detach(), (logits.argmax(-1) == batch.targets[part]).float()))
            )
        if train:
            hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        sums = torch.zeros(2, len(rows), device=self._device, dtype=torch.float64)
        sums.index_add_(1, batch.owners, torch.cat(results, 1).double())
        for row, loss, num_right in zip(rows, *sums.tolist(), strict=True):
            row.loss, row.num_right = loss, int(num_right)

    def _hidden(self, batch: _Batch, adapters: Tensor) -> Tensor:
        """Returns what the output matrix would be applied to, at the predicting positions alone."""
        kept: list[Tensor] = []

        def take(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(args[0][batch.predicts])
            return (args[0][:, :0],)

        handle = self._head.register_forward_pre_hook(take)
        try:
            with self._bank.editing(adapters):
                self._model(**batch.inputs, use_cache=False)
        finally:
            handle.remove()
        return kept[0]

    def _causal(self, examples: Sequence[Example]) -> _Batch:
        """Pads on the right, where causal attention never looks, so there is no mask."""
        sequences = [example.inputs + example.targets for example in examples]
        ids = padded([sequence[:-1] for sequence in sequences], 0)
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            predicts[row, len(example.inputs) - 1 : example.length - 1] = True
        return self._batch({"input_ids": ids}, predicts, examples)

    def _seq2seq(self, examples: Sequence[Example]) -> _Batch:
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
        predicts = torch.arange(decoder.shape[1])[None] < lengths[:, None]
        return self._batch(inputs, predicts, examples)

    def _batch(
        self, inputs: dict[str, Tensor], predicts: Tensor, examples: Sequence[Example]
    ) -> _Batch:
        targets = torch.tensor([token for example in examples for token in example.targets])
        lengths = torch.tensor([len(example.targets) for example in examples])
        owners = torch.arange(len(examples)).repeat_interleave(lengths)
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        return _Batch(
            moved, predicts.to(self._device), targets.to(self._device), owners.to(self._device)
        )

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Raises InvalidArgumentError where the model makes its logits in a way we do not know."""
        ids = tuple(i % self._head.weight.shape[0] for i in (3, 1, 4, 1, 5))
        batch = self._collate([Example(ids[:2], ids[2:])])
        rows = torch.zeros(1, dtype=torch.long, device=self._device)
        ours = self._logits(self._hidden(batch, rows)).float()
        theirs = self._model(**batch.inputs, use_cache=False).logits[batch.predicts].float()
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise InvalidArgumentError(
                f"{self._model.config.model_type!r} models make their logits in a way that "
                "training does not know"
            )


def _logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Returns the function from the output matrix's input to the model's logits."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    divisor = getattr(config, "logits_scaling", None)  # Granite

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if divisor is not None:
            logits = logits / divisor
        return cap * torch.tanh(logits / cap) if cap is not None else logits

    return logits_of


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
