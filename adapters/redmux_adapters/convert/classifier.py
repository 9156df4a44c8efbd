"""Classification heads beside the vectors: the authors' classifier.pth, PEFT's modules_to_save."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..format.head import KINDS, Head, HeadConfig
from ..format.strictjson import shown

_STARTS = ("classifier.", "pre_classifier.")


def is_classifier(name: str) -> bool:
    """Whether `name` is that of a tensor of a head in a model of transformers."""
    return name.startswith(_STARTS)


def read_classifier(
    tensors: Mapping[str, Tensor],
    labels: Sequence[str] | None,
    problem_type: str | None,
    model_type: str,
) -> Head:
    """Returns the head in tensors named as inside it ("dense.weight") or in the whole model.

    `model_type` is the base model's: the heads of ELECTRA and RoBERTa differ in no name.

    Without labels they are LABEL_0, LABEL_1 and so on, and one output means regression, as in
    transformers. Raises InvalidAdapterError for other heads.
    """
    inner = {
        name.removeprefix("classifier.") if "classifier.dense.weight" in tensors else name: tensor
        for name, tensor in tensors.items()
    }
    kind = next((kind for kind, names in KINDS.items() if set(names) == set(inner)), None)
    if kind is None:
        raise InvalidAdapterError(
            f"a head of the tensors {shown(', '.join(inner))} is of no known kind; known are "
            f"{', '.join(KINDS)}"
        )
    if kind == "roberta" and model_type == "electra":
        kind = "electra"
    output = next(name for name, shape in KINDS[kind].items() if shape == "lh")
    count = inner[output].shape[0]
    if labels is None:
        labels = [f"LABEL_{index}" for index in range(count)]
    if problem_type is None:
        problem_type = "regression" if count == 1 else "single_label_classification"
    return Head(HeadConfig(kind, tuple(labels), problem_type), inner)
