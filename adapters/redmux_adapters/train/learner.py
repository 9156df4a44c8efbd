"""One adapter under training: what it learns from, its optimizer and its end."""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from redmux.errors import InvalidArgumentError

from ..format.adapter import Adapter
from ..format.config import AdapterMetadata
from ..format.prompt import PromptFormat
from ..format.vectors import MAX_MAGNITUDE
from .bank import VectorBank
from .classifier import TrainedHead
from .correlation import matthews, pearson
from .events import Ending, Evaluated, Event, Finished, Stepped
from .examples import Example
from .objectives import Row
from .options import TrainingOptions, rate_factor
from .stream import BatchStream

_LEARNS = {"matthews": "labels", "pearson": "scores"}  # what a metric is for


@dataclass(frozen=True, eq=False)
class Task:
    """What one adapter is trained on, and how. `options.learning_rate` has to be set."""

    name: str
    train: Sequence[Example]
    options: TrainingOptions
    valid: Sequence[Example] = ()  # held out, for choosing the best vectors
    prompt_format: PromptFormat | None = None
    labels: tuple[str, ...] = ()  # of a classifier; none for scores
    start: Adapter | None = None  # whose vectors and head it begins with, instead of no edit
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)

    def __post_init__(self) -> None:
        if not self.train:
            raise InvalidArgumentError(f"task {self.name!r} has no training examples")
        if self.options.learning_rate is None:
            raise InvalidArgumentError(f"task {self.name!r} has no learning rate")
        if self.options.patience and not self.valid:
            raise InvalidArgumentError(
                f"task {self.name!r} has patience={self.options.patience} but no held-out data; "
                "give valid or valid_share"
            )
        metric, train = self.options.metric, self.train[0]
        learns = "labels" if self.labels else "answers" if train.targets else "scores"
        if metric in _LEARNS and learns != _LEARNS[metric]:
            raise InvalidArgumentError(
                f"task {self.name!r} has metric={metric}, which is for {_LEARNS[metric]}; it "
                f"learns {learns}"
            )

    @property
    def head_kind(self) -> str:
        """The kind of a classifier's head: that of the adapter to start from, if not another."""
        start = None if self.start is None else self.start.head
        is_open = start is not None and self.options.head == "auto"
        return start.config.kind if start is not None and is_open else self.options.head

    @property
    def has_accuracy(self) -> bool:
        """Whether results are right or wrong, not scores."""
        return bool(self.labels or self.train[0].targets)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps that were asked for."""
        per_epoch = -(-len(self.train) // self.options.batch_size)
        return self.options.steps or max(1, round(self.options.epochs * per_epoch))

    def identity(self) -> dict[str, str]:
        """Returns everything that decides the result, as texts to compare."""
        data = hashlib.sha256(repr((self.train, self.valid)).encode()).hexdigest()
        start = None if self.start is None else self.start.digest
        values = asdict(self.options) | {"data": data, "labels": self.labels, "start": start}
        return {name: json.dumps(value) for name, value in values.items()}


class Learner:
    """The state of one task: a row of the bank, its optimizer, its place in the data.

    Nothing here depends on the tasks beside it. Belongs to the trainer's thread.
    """

    def __init__(
        self,
        task: Task,
        row: int,
        bank: VectorBank,
        sites: Mapping[str, int],
        head: TrainedHead | None = None,
    ) -> None:
        self.task = task
        self.row = row
        self.sites = sites
        self.head = head
        self._head = {} if head is None else head.parameters
        self.step = 0  # optimizer steps taken
        self.num_tokens = 0
        self.ending: Ending | None = None
        self.best: Evaluated | None = None
        self._num_worse = 0  # evaluations since the best one
        self._best_state: dict[str, Tensor] = {}
        self._values = nn.Parameter(bank.values[row])  # the bank's own memory
        self._values.grad = bank.grads[row]
        self._frozen = ~bank.mask(sites, task.options.train)
        bank.normalise(row, sites)
        self._kept: Tensor | None = None  # what an adapter to start from had where nothing learns
        if task.start is not None:
            bank.take(row, task.start.edits)
            self._kept = self._values.detach().clone()
            if head is not None and task.start.head is not None:
                head.take(task.start.head)
        self._stream = BatchStream(
            [e.length for e in task.train], task.options.batch_size, task.options.seed
        )
        self._rates = [task.options.learning_rate or 0.0]
        groups: list[dict[str, Any]] = [
            {"params": [self._values], "weight_decay": task.options.weight_decay}
        ]
        if head is not None:
            groups.append({"params": list(self._head.values()), "weight_decay": 0.0})
            self._rates.append(task.options.head_learning_rate)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0)

    def next_rows(self) -> list[Row]:
        """Returns the next batch; each loss term counts for its share of the batch's mean."""
        examples = [self.task.train[i] for i in self._stream.next()]
        weight = 1 / sum(_num_terms(example) for example in examples)
        smoothing = self.task.options.label_smoothing
        return [Row(self.row, example, weight, smoothing) for example in examples]

    def update(self, rows: Sequence[Row]) -> list[Event]:
        """Takes an optimizer step by the gradients in the bank, which are cleared.

        Values or gradients that are not finite end the training, before they reach the vectors.
        """
        options = self.task.options
        factor = rate_factor(options, self.step, self.task.num_steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        loss = sum(row.loss * row.weight for row in rows)
        parameters = [self._values, *self._head.values()]
        assert self._values.grad is not None
        self._values.grad.masked_fill_(self._frozen, 0)  # an index would make a GPU wait
        norm = nn.utils.clip_grad_norm_(parameters, options.clip_norm or math.inf).item()
        if math.isfinite(loss) and math.isfinite(norm):
            self._optimizer.step()
            if self._kept is not None:  # weight decay pulls at all values
                self._values.data.copy_(torch.where(self._frozen, self._kept, self._values.data))
        self.clear_gradients()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return [self._diverge(f"loss {loss:g}, gradient norm {norm:g}")]
        if not self._values.abs().max() < MAX_MAGNITUDE:
            return [self._diverge(f"a value beyond {MAX_MAGNITUDE:g}")]
        self.step += 1
        tokens = sum(row.example.length for row in rows)
        self.num_tokens += tokens
        rate = self._rates[0] * factor
        done = self.task.num_steps
        return [Stepped(self.task.name, self.step, done, loss, rate, norm, tokens)]

    def clear_gradients(self) -> None:
        """Forgets what passes have added since the last step."""
        for parameter in (self._values, *self._head.values()):
            assert parameter.grad is not None
            parameter.grad.zero_()

    @property
    def wants_baseline(self) -> bool:
        """Whether the held-out data is due before the first step."""
        return self.step == 0 and self.best is None and bool(self.task.valid)

    @property
    def wants_evaluation(self) -> bool:
        """Whether the held-out data is due after the step that was taken."""
        if self.ending is not None or not self.task.valid:
            return False
        is_last = self.step == self.task.num_steps
        return is_last or self.step % self.task.options.eval_every == 0

    def evaluation_rows(self) -> list[Row]:
        """Returns the held-out examples."""
        return [Row(self.row, example) for example in self.task.valid]

    def judge(self, rows: Sequence[Row]) -> list[Event]:
        """Takes the held-out results in, and keeps the vectors if they are the best so far."""
        terms = sum(_num_terms(row.example) for row in rows)
        loss = sum(row.loss for row in rows) / terms
        accuracy = sum(row.num_right for row in rows) / terms if self.task.has_accuracy else None
        correlation = self._correlation(rows)
        is_best = self._is_better(loss, accuracy, correlation)
        result = Evaluated(self.task.name, self.step, loss, accuracy, is_best, correlation)
        self._num_worse = 0 if is_best else self._num_worse + 1
        if is_best:
            self.best, self._best_state = result, self._vectors()
        patience = self.task.options.patience
        if patience and self._num_worse >= patience and self.step < self.task.num_steps:
            return [result, self.end("stopped early", f"{patience} evaluations without gain")]
        return [result]

    def end(self, ending: Ending, detail: str = "") -> Finished:
        """Ends the training; the learner takes no further part."""
        self.ending = ending
        return Finished(self.task.name, self.step, ending, detail)

    def result(self) -> dict[str, Tensor]:
        """Returns the best vectors, or the last where nothing was held out.

        "values" is a row of the bank; the other names are the head's.
        """
        return self._best_state or self._vectors()

    def state(self) -> dict[str, Any]:
        """Returns copies of all that `restore` needs to go on, as tensors and plain values."""
        return {
            "identity": self.task.identity(),
            "step": self.step,
            "num_tokens": self.num_tokens,
            "ending": self.ending,
            "best": None if self.best is None else asdict(self.best),
            "num_worse": self._num_worse,
            "best_state": self._best_state,
            "vectors": self._vectors(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "position": self._stream.position,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state, whose identity has to be this task's."""
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.ending, self._num_worse = state["ending"], state["num_worse"]
        self.best = None if state["best"] is None else Evaluated(**state["best"])
        self._best_state = state["best_state"]
        self._values.copy_(state["vectors"]["values"])
        for name, parameter in self._head.items():
            parameter.copy_(state["vectors"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._stream.position = state["position"]

    def _vectors(self) -> dict[str, Tensor]:
        vectors = {"values": self._values, **self._head}
        return {name: tensor.detach().cpu().clone() for name, tensor in vectors.items()}

    def _diverge(self, what: str) -> Finished:
        return self.end("diverged", f"{what} at step {self.step + 1}; try a lower learning rate")

    def _correlation(self, rows: Sequence[Row]) -> float | None:
        correlations = {"matthews": matthews, "pearson": pearson}
        metric = self.task.options.metric
        if metric not in correlations:
            return None
        return correlations[metric](
            [row.predicted for row in rows], [row.example.label for row in rows]
        )

    def _is_better(self, loss: float, accuracy: float | None, correlation: float | None) -> bool:
        if self.best is None:
            return True
        if correlation is not None and self.best.correlation is not None:
            return correlation > self.best.correlation
        if self.task.options.metric == "accuracy" and accuracy is not None:
            return accuracy > (self.best.accuracy or 0.0)
        return loss < self.best.loss


def _num_terms(example: Example) -> int:
    """Returns the number of loss terms: the answer's tokens, or the one label."""
    return len(example.targets) or 1
