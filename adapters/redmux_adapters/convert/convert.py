"""Makes a RED adapter of another library's file, whose kind its own keys tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from redmux.errors import InvalidAdapterError

from ..bases.sites import addressable_sites, with_layer_norms
from ..format.adapter import Adapter, Edit
from ..format.config import AdapterMetadata
from ..format.files import check_sites
from ..format.head import KINDS, Head, check_shapes
from ..format.prompt import PromptFormat
from ..format.strictjson import shown
from .bitfit import read_bitfit
from .classifier import is_classifier, read_classifier
from .control_vector import is_direction, read_control_vector
from .delta_vector import MARK, read_delta_vector
from .ia3 import read_ia3
from .isolated import read_isolated
from .peft import BEFT, IA3, NORM, PREFIX, read_beft, read_norms
from .target import Target

# The files that a folder may hold, and the head that lies beside the authors' vectors.
_FILES = ("delta_vector.pth", "adapter_model.safetensors", "adapter_model.bin")
_CLASSIFIER = "classifier.pth"

# What other methods call their tensors, and why they are no edit.
_OTHER_METHODS = {
    "lora_": "LoRA adds a product of matrices, which mixes outputs; an edit changes each by itself",
    "vera_": "VeRA adds a product of matrices, which mixes outputs",
    "hada_": "LoHa changes the weights by a product of matrices, which mixes outputs",
    "oft_": "OFT rotates outputs, which mixes them",
    "boft_": "BOFT rotates outputs, which mixes them",
    "road_": "RoAd rotates pairs of outputs, which mixes them",
    "hira_": "HiRA changes every weight by itself, not every output",
    "prompt_embeddings": "prompt tuning puts tokens before the prompt and edits no output",
    "adaption_": "LLaMA-Adapter adds attention over trained tokens, which depends on the query",
}


class Converted(NamedTuple):
    """An adapter and what it was made of, in words."""

    adapter: Adapter
    kind: str


@dataclass(frozen=True)
class Options:
    """What a file does not say itself.

    `strength` is what control vectors are multiplied with. `labels` and `problem_type` describe the
    head, where the file has one. `timeout_s` bounds the reading of each file, from the start of the
    process that does it.
    """

    strength: float = 1.0
    labels: Sequence[str] | None = None
    problem_type: str | None = None
    prompt_format: PromptFormat | None = None
    metadata: AdapterMetadata | None = None
    timeout_s: float = 120.0


def convert(path: str | Path, target: Target, options: Options = Options()) -> Converted:
    """Returns the adapter in a file or folder of another library, for the base model `target`.

    Known are the RED authors' vectors (`delta_vector.pth`, with the `classifier.pth` beside it),
    PEFT's IA3, BEFT and LN tuning, BitFit's biases, and control vectors of repeng and llama.cpp.
    Files are opened by a subprocess with limits, see `read_isolated`. With the base model at hand,
    every module path and size is checked against it, those of a head too.

    Raises InvalidAdapterError for what is no scale and bias at module outputs, with the reason.
    """
    path = _file_in(Path(path))
    tensors = read_isolated(path, options.timeout_s)
    classifier: Mapping[str, Tensor] = {}
    beside = path.with_name(_CLASSIFIER)
    if _is_red(tensors) and beside.is_file():
        classifier = read_isolated(beside, options.timeout_s)
    return convert_tensors(tensors, target, options, classifier)


def convert_tensors(
    tensors: Mapping[str, Tensor],
    target: Target,
    options: Options = Options(),
    classifier: Mapping[str, Tensor] = MappingProxyType({}),
) -> Converted:
    """Returns what `convert` does, of tensors that are read, with those of a head's own file."""
    edits, inner_head, kind = _edits(tensors, target, options.strength)
    head_tensors = classifier or inner_head
    head: Head | None = None
    if head_tensors:
        head = read_classifier(
            head_tensors, options.labels, options.problem_type, target.model_type
        )
    elif options.labels is not None or options.problem_type is not None:
        raise InvalidAdapterError("the file has no head, so there is nothing to label")
    adapter = Adapter(
        target.fingerprint,
        edits,
        options.prompt_format,
        options.metadata or AdapterMetadata(),
        head,
    )
    if target.model is not None:
        check_sites(adapter.sites, with_layer_norms(addressable_sites(target.model)))
        if head is not None:
            config: Any = target.model.config
            shapes = {name: tuple(tensor.shape) for name, tensor in head.tensors.items()}
            check_shapes(head.config, shapes, config.get_text_config().hidden_size)
    return Converted(adapter, kind)


_RED = "RED vectors of the authors' code"


def _edits(
    tensors: Mapping[str, Tensor], target: Target, strength: float
) -> tuple[dict[str, Edit], dict[str, Tensor], str]:
    """Returns the edits, the tensors of a head, and the kind in words."""
    if _is_red(tensors):
        return read_delta_vector(tensors), {}, _RED
    if tensors and all(map(is_direction, tensors)):
        vectors = read_control_vector(tensors, target.model_type, strength)
        return vectors, {}, "control vector"
    if strength != 1:
        raise InvalidAdapterError("only control vectors have a strength")
    inner = {name.removeprefix(PREFIX): name for name in tensors}
    head = {short: tensors[name] for short, name in inner.items() if is_classifier(short)}
    own = {name: tensors[name] for short, name in inner.items() if not is_classifier(short)}
    if own and all(name.endswith(IA3) for name in own):
        return read_ia3(own, target), head, "IA3 of PEFT"
    if own and all(name.endswith(BEFT) for name in own):
        return read_beft(own), head, "BEFT of PEFT"
    if own and all(NORM in name for name in own):
        return read_norms(own, target), head, "LN tuning of PEFT"
    if own and all(name.endswith(".bias") for name in own):
        return read_bitfit(own, target), head, "trained biases"
    raise InvalidAdapterError(_why_not(tensors))


def _is_red(tensors: Mapping[str, Tensor]) -> bool:
    return any(MARK in name for name in tensors)


def _why_not(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return "the file holds no tensors"
    if any(set(tensors) == set(names) for names in KINDS.values()):
        return (
            "the file is a classification head alone; convert the delta_vector.pth that lies "
            "beside it"
        )
    for name in tensors:
        for mark, reason in _OTHER_METHODS.items():
            if mark in name:
                return f"{shown(name)}: {reason}"
    known = (MARK, IA3, BEFT, NORM, "direction.", ".bias")
    odd = next((n for n in tensors if not any(mark in n for mark in known)), next(iter(tensors)))
    return (
        f"unexpected entry {shown(odd)}; known are files of RED, control vectors, PEFT's IA3, "
        "BEFT and LN tuning, and files of biases alone"
    )


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise InvalidAdapterError(f"{path} has none of the files {', '.join(_FILES)}")
