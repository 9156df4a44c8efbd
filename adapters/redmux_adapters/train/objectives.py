"""What is minimised: the loss of a batch's rows, and its gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redmux.errors import InvalidArgumentError

from .bank import VectorBank
from .base import TrainingBase
from .examples import Example
from .packed import PackedDecoder, can_pack
from .padded import PaddedModel, precision

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


class GenerationObjective:
    """Cross-entropy of the answers' tokens, of causal and of encoder-decoder models.

    Llama-like models on a CPU run without padding, everything else as transformers has it. The
    output matrix is applied to the positions that predict an answer's token, a chunk at a time, so
    logits of a large vocabulary are never all in memory.
    """

    def __init__(self, base: TrainingBase, bank: VectorBank, autocast: bool = False) -> None:
        self._autocast = autocast
        self._device = bank.values.device
        self._head: Any = base.model.get_output_embeddings()
        self._logits = _logits_of(base.model)
        padded = PaddedModel(base, bank, autocast)
        packs = base.kind == "causal" and can_pack(base.model)
        self._decoder = PackedDecoder(base.model, bank, autocast) if packs else padded
        self._check_logits(base.model, padded)

    @property
    def pads(self) -> bool:
        """Whether a pass computes as many positions of each example as of its longest."""
        return self._decoder.pads

    def run(self, rows: Sequence[Row], train: bool) -> None:
        """Computes the rows' losses and, if `train`, adds their gradients to the bank."""
        examples = [row.example for row in rows]
        with torch.set_grad_enabled(train):
            hidden = self._decoder.hidden(examples, [row.adapter for row in rows])
        leaf = hidden.detach().requires_grad_(train)  # [terms, hidden size]
        targets = torch.tensor([token for e in examples for token in e.targets])
        lengths = torch.tensor([len(example.targets) for example in examples])
        owners = torch.arange(len(rows)).repeat_interleave(lengths).to(self._device)
        terms = _Terms(
            targets.to(self._device),
            torch.tensor([row.weight for row in rows], device=self._device)[owners],
            torch.tensor([row.smoothing for row in rows], device=self._device)[owners],
        )
        results = []
        size = max(1, _CHUNK_VALUES // self._head.weight.shape[0])
        for start in range(0, len(leaf), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(train), precision(self._device, self._autocast):
                logits = self._logits(leaf[part]).float()  # [terms of the chunk, vocabulary]
            chunk = _Terms(*(values[part] for values in terms))
            found, gradient = _cross_entropy(logits.detach(), chunk, train)
            results.append(found)
            if gradient is not None:
                logits.backward(gradient)  # type: ignore[no-untyped-call]
        if train:
            hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        sums = torch.zeros(2, len(rows), device=self._device, dtype=torch.float64)
        sums.index_add_(1, owners, torch.cat(results, 1).double())
        for row, loss, num_right in zip(rows, *sums.tolist(), strict=True):
            row.loss, row.num_right = loss, int(num_right)

    @torch.no_grad()
    def _check_logits(self, model: Any, padded: PaddedModel) -> None:
        """Raises InvalidArgumentError where the model makes its logits in a way we do not know."""
        ids = tuple(i % self._head.weight.shape[0] for i in (3, 1, 4, 1, 5))
        example = Example(ids[:2], ids[2:])
        hidden = self._decoder.hidden([example], [0])
        with precision(self._device, self._autocast):
            ours = self._logits(hidden).float()
        batch = padded.batch([example])
        theirs = model(**batch.inputs, use_cache=False).logits[batch.predicts].float()
        is_narrow = self._autocast or self._head.weight.dtype != torch.float32
        tolerance = 0.1 if is_narrow else 0.01  # the two ways round to bf16 in other places
        if not torch.allclose(ours, theirs, tolerance, tolerance * float(theirs.abs().max())):
            raise InvalidArgumentError(
                f"{model.config.model_type!r} models make their logits in a way that "
                "training does not know"
            )


class _Terms(NamedTuple):
    """What the loss of each predicted token is made of, [terms] each."""

    targets: Tensor
    weights: Tensor
    smoothing: Tensor


def _cross_entropy(logits: Tensor, terms: _Terms, train: bool) -> tuple[Tensor, Tensor | None]:
    """Returns losses and whether the likeliest was right, [2, terms], and the logits' gradient.

    That is of the weighted sum of the losses, smoothed, and only there if `train`. By hand, it
    takes one array of the logits' size and not three.
    """
    targets = terms.targets[:, None]
    largest = logits.amax(-1, keepdim=True)
    is_right = logits.gather(1, targets) == largest
    values = logits.log_softmax(-1)
    losses = -values.gather(1, targets)
    found = torch.cat((losses, is_right.float()), 1).t()
    if not train:
        return found, None
    gradient = values.exp_()
    gradient.scatter_add_(1, targets, (terms.smoothing - 1)[:, None])
    gradient.sub_((terms.smoothing / logits.shape[-1])[:, None])
    return found, gradient.mul_(terms.weights[:, None])


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
