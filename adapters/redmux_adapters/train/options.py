"""What can be set for one adapter's training, complete after construction."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from redmux.errors import InvalidArgumentError

from ..bases.sites import POSITIONS
from ..format.head import KINDS
from ..format.window import is_apply

SCHEDULES = ("linear", "cosine", "constant")
PARTS = ("both", "scale", "bias", "ln", "head")
HEADS = ("auto", *KINDS)
METRICS = ("loss", "accuracy", "matthews", "pearson")


@dataclass(frozen=True)
class TrainingOptions:
    """How one adapter is trained. Raises InvalidArgumentError for values that cannot be meant.

    `learning_rate` None stands for what `default_learning_rate` returns for the base model.
    """

    learning_rate: float | None = None
    head_learning_rate: float = 1e-2  # of a classification head, which starts from random values
    steps: int | None = None  # optimizer steps; None: as many as `epochs` take
    epochs: float = 3.0
    batch_size: int = 16  # examples per optimizer step
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06  # share of the steps in which the rate rises
    warmup_steps: int | None = None  # number of these steps, instead of a share of all
    weight_decay: float = 0.0  # pulls scales to 1 and biases to 0
    clip_norm: float = 1.0  # 0: gradients are not clipped
    label_smoothing: float = 0.0
    sites: str = (
        "ffn"  # a position of the paper, "all", or patterns of module paths with *, and commas
    )
    layers: str = "all"  # "all", or numbers and ranges, as in "0-5,11"
    # Which tokens are edited, see `check_apply`; None: as in the adapter of the start, else all.
    apply: str | None = None
    # "ln" is both and a LayerNorm behind them; "head" is no edit, to compare with.
    train: Literal["both", "scale", "bias", "ln", "head"] = "both"
    eval_every: int = 50  # steps between evaluations, where there is held-out data
    patience: int = 0  # evaluations without improvement before an early stop; 0: never
    # What is best on held-out data.
    metric: Literal["loss", "accuracy", "matthews", "pearson"] = "loss"
    head: str = "auto"  # kind of a classification head; auto: as transformers has it
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kinds, is_right, right) in _RULES.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not is_right(value):
                raise InvalidArgumentError(f"{name} is {value!r}; it has to be {right}")

    def describe(self) -> str:
        """Returns the options that decide the vectors, in one line, for an adapter's metadata."""
        rate = f"{self.learning_rate:g}" if self.learning_rate is not None else "default"
        warmup = f"{100 * self.warmup:g} %" if self.warmup_steps is None else self.warmup_steps
        text = (
            f"AdamW, lr {rate}, {self.schedule}, warm-up {warmup}, batches of "
            f"{self.batch_size}, clip {self.clip_norm:g}, weight decay {self.weight_decay:g}, "
            f"seed {self.seed}"
        )
        defaults = TrainingOptions()
        for name in ("label_smoothing", "sites", "layers", "apply", "train", "head"):
            value = getattr(self, name)
            if value != getattr(defaults, name):
                text += f", {name} {value}"
        return text


_Rule = tuple[type | tuple[type, ...], Callable[[Any], bool], str]
_NUMBER = (int, float)
_MAY_BE_NONE = ("learning_rate", "steps", "warmup_steps", "apply")
_RULES: dict[str, _Rule] = {
    "learning_rate": (_NUMBER, lambda x: 0 < x < 10, "above 0 and below 10, such as 0.02"),
    "head_learning_rate": (_NUMBER, lambda x: 0 < x < 10, "above 0 and below 10"),
    "steps": (int, lambda x: x > 0, "a whole number above 0"),
    "epochs": (_NUMBER, lambda x: 0 < x < 1e6, "a number above 0"),
    "batch_size": (int, lambda x: x > 0, "a whole number above 0"),
    "schedule": (str, lambda x: x in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup": (_NUMBER, lambda x: 0 <= x < 1, "a share from 0 to below 1"),
    "warmup_steps": (int, lambda x: x >= 0, "a whole number from 0 on"),
    "weight_decay": (_NUMBER, lambda x: 0 <= x < 1, "from 0 to below 1"),
    "clip_norm": (_NUMBER, lambda x: 0 <= x < float("inf"), "0 or above"),
    "label_smoothing": (_NUMBER, lambda x: 0 <= x < 1, "from 0 to below 1"),
    "sites": (
        str,
        lambda x: x.strip() != "",
        f'one of {", ".join(POSITIONS)}, "all" or patterns of module paths',
    ),
    "layers": (str, lambda x: x.strip() != "", '"all" or numbers and ranges such as "0-5,11"'),
    "apply": (str, is_apply, 'one of all, prompt, generation or "after:TEXT"'),
    "train": (str, lambda x: x in PARTS, f"one of {', '.join(PARTS)}"),
    "eval_every": (int, lambda x: x > 0, "a whole number above 0"),
    "patience": (int, lambda x: x >= 0, "a whole number from 0 on"),
    "metric": (str, lambda x: x in METRICS, f"one of {', '.join(METRICS)}"),
    "head": (str, lambda x: x in HEADS, f"one of {', '.join(HEADS)}"),
    "seed": (int, lambda x: 0 <= x < 1 << 63, "a whole number from 0 on"),
}
OPTION_NAMES = tuple(item.name for item in fields(TrainingOptions))


def default_learning_rate(num_parameters: int, has_head: bool = False) -> float:
    """Returns the rate to start with for a base model of this size, with a head or without.

    RED takes far larger steps than weights do: the paper's rates go from 1e-3 to 6e-2. 2e-2 was
    tried on SmolLM2-135M over several tasks, 5e-3 on an encoder of 23 million parameters; the
    values for large models only follow the paper's range.
    """
    if has_head:
        return 5e-3
    if num_parameters < 1_000_000_000:
        return 2e-2
    return 5e-3 if num_parameters < 4_000_000_000 else 1e-3


def rate_factor(options: TrainingOptions, step: int, num_steps: int) -> float:
    """Returns what the learning rate is multiplied by in a step, counted from 0: above 0, up to 1.

    It rises in a line over the warm-up and then falls to 0, which the step after the last would
    have.
    """
    num_warmup = options.warmup_steps
    if num_warmup is None:
        num_warmup = round(options.warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 1 - done if options.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
