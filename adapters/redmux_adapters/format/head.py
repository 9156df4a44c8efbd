"""A classification head: dense tensors that an adapter of an encoder brings beside its edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redmux.errors import InvalidAdapterError

from .strictjson import require_text, shown

MAX_LABELS = 1024
MAX_LABEL_CHARS = 128
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# The tensors of each kind of head, named as in transformers, with their shapes: h is the base
# model's hidden size, l the number of labels.
KINDS: Mapping[str, Mapping[str, str]] = {
    # First token -> dense -> tanh -> out_proj: RoBERTa, MPNet and the RED authors' ClassifierHead.
    "roberta": {
        "dense.weight": "hh",
        "dense.bias": "h",
        "out_proj.weight": "lh",
        "out_proj.bias": "l",
    },
    # First token -> dense -> GELU -> out_proj.
    "electra": {
        "dense.weight": "hh",
        "dense.bias": "h",
        "out_proj.weight": "lh",
        "out_proj.bias": "l",
    },
    # First token -> pre_classifier -> ReLU -> classifier.
    "distilbert": {
        "pre_classifier.weight": "hh",
        "pre_classifier.bias": "h",
        "classifier.weight": "lh",
        "classifier.bias": "l",
    },
    # The base model's own pooler -> classifier.
    "bert": {"classifier.weight": "lh", "classifier.bias": "l"},
    # Mean over all tokens -> classifier.
    "mean": {"classifier.weight": "lh", "classifier.bias": "l"},
}

HeadArrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class HeadConfig:
    """What a head is: the value of `head` in adapter_config.json.

    `kind` is a key of KINDS; `labels` name the outputs in their order, for regression as well.
    Construction raises InvalidAdapterError for anything else.
    """

    kind: str
    labels: Sequence[str]
    problem_type: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidAdapterError(
                f"head kind is {shown(self.kind)}; known are {', '.join(KINDS)}"
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise InvalidAdapterError(
                f"head problem_type is {shown(self.problem_type)}; it has to be one of "
                f"{', '.join(PROBLEM_TYPES)}"
            )
        labels = self.labels
        if not isinstance(labels, list | tuple) or not 0 < len(labels) <= MAX_LABELS:
            raise InvalidAdapterError(
                f"head labels are {shown(labels)}; they have to be a list of 1 to {MAX_LABELS} "
                "names"
            )
        for label in labels:
            if not require_text(label, "a label", MAX_LABEL_CHARS):
                raise InvalidAdapterError("a label is empty; every output has a name")
        if len(set(labels)) < len(labels):
            raise InvalidAdapterError(f"head labels are {shown(labels)}; each may occur once")
        if self.problem_type == "single_label_classification" and len(labels) == 1:
            raise InvalidAdapterError(
                "a head with one output chooses between no labels; its problem_type has to be "
                "regression or multi_label_classification"
            )
        object.__setattr__(self, "labels", tuple(labels))

    @classmethod
    def from_json(cls, value: object) -> "HeadConfig":
        """Returns the head that the parsed JSON `value` describes; raises InvalidAdapterError."""
        keys = ("kind", "labels", "problem_type")
        if not isinstance(value, dict) or sorted(value) != sorted(keys):
            raise InvalidAdapterError(
                f"head is {shown(value)}; it has to be an object of {', '.join(keys)}"
            )
        return cls(value["kind"], value["labels"], value["problem_type"])

    def to_json(self) -> dict[str, Any]:
        """Returns the value of `head` in adapter_config.json."""
        return {
            "kind": self.kind,
            "labels": list(self.labels),
            "problem_type": self.problem_type,
        }


@dataclass(frozen=True, eq=False)
class Head:
    """A head and its tensors, fp32 on the CPU, that nobody may write to.

    Construction raises InvalidAdapterError unless the tensors are those of the kind, each [out, in]
    or [out], with one output per label.
    """

    config: HeadConfig
    tensors: Mapping[str, Tensor]  # such as "out_proj.weight": [labels, hidden size]

    def __post_init__(self) -> None:
        check_shapes(self.config, {name: tuple(t.shape) for name, t in self.tensors.items()})
        own = {
            name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, tensor in sorted(self.tensors.items())
        }
        object.__setattr__(self, "tensors", MappingProxyType(own))

    @property
    def hidden_size(self) -> int:
        """Hidden size of the base models that the head fits."""
        return self.tensors[_output(self.config.kind)].shape[1]

    @property
    def num_parameters(self) -> int:
        """Number of values, which the parameter counts of adapters leave out as the paper does."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def arrays(self) -> HeadArrays:
        """Returns the tensors as views that nobody may write to."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def check_shapes(
    config: HeadConfig, shapes: Mapping[str, tuple[int, ...]], hidden_size: int | None = None
) -> None:
    """Raises InvalidAdapterError unless `shapes` are those of the kind's tensors.

    `hidden_size` is the base model's; None takes the head's own.
    """
    expected = KINDS[config.kind]
    if set(shapes) != set(expected):
        raise InvalidAdapterError(
            f"a head of kind {config.kind!r} has the tensors {', '.join(expected)}; found "
            f"{shown(', '.join(sorted(shapes)) or 'none')}"
        )
    output = shapes[_output(config.kind)]
    sizes = {"l": len(config.labels), "h": hidden_size or (output[-1] if output else 0)}
    for name, letters in expected.items():
        wanted = tuple(sizes[letter] for letter in letters)
        if shapes[name] != wanted:
            raise InvalidAdapterError(
                f"head.{name} has shape {list(shapes[name])}; for {len(config.labels)} labels and "
                f"hidden size {sizes['h']} it has to be {list(wanted)}"
            )


def _output(kind: str) -> str:
    """Returns the name of the weight whose rows are the labels."""
    return next(name for name, letters in KINDS[kind].items() if letters == "lh")
