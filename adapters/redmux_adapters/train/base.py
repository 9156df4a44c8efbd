"""The frozen base model that adapters are trained on."""

from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from redmux.errors import InvalidArgumentError

from ..bases.fingerprint import fingerprint
from ..bases.load import (
    load_base,
    load_encoder,
    load_seq2seq_base,
    load_tokenizer,
    read_config,
    resolve,
)
from ..bases.sites import POSITIONS, linear_sites, red_sites, with_layer_norms
from .examples import Kind
from .options import TrainingOptions


@dataclass(frozen=True, eq=False)
class TrainingBase:
    """A frozen model with what training needs to know of it."""

    name: str  # for the adapters' metadata
    kind: Kind
    model: Any
    tokenizer: Any
    fingerprint: str

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, name: str = "", kind: Kind = "causal"
    ) -> "TrainingBase":
        """Returns the base of a model as transformers loads it, which is frozen by this."""
        model.eval().requires_grad_(False)
        return cls(name, kind, model, tokenizer, fingerprint(model))

    @property
    def num_parameters(self) -> int:
        """Number of the model's weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a generation."""
        config = getattr(self.model, "generation_config", None)
        eos = None if config is None else config.eos_token_id
        ids = eos if isinstance(eos, list) else [eos]
        return sorted({i for i in (*ids, self.tokenizer.eos_token_id) if i is not None})

    def sites_of(self, options: TrainingOptions) -> dict[str, int]:
        """Returns {site: size} of what an adapter with these options edits; see `choose_sites`."""
        sites = self.choose_sites(options.sites, options.layers)
        return with_layer_norms(sites) if options.train == "ln" else sites

    def choose_sites(self, sites: str, layers: str) -> dict[str, int]:
        """Returns {module path: output size} of the sites that the two options name.

        Raises InvalidArgumentError where they name none.
        """
        numbers = _parse_layers(layers)
        if sites in POSITIONS:
            return red_sites(self.model, sites, layers=numbers)
        linears = linear_sites(self.model)
        chosen: dict[str, int] = {}
        for pattern in ("*" if sites == "all" else sites).split(","):
            found = {s: d for s, d in linears.items() if fnmatchcase(s, pattern.strip())}
            if not found:
                raise InvalidArgumentError(
                    f"sites: no linear module matches {pattern!r}; one is {next(iter(linears))}"
                )
            chosen |= found
        if numbers is not None:
            depths = {_layer(site) for site in chosen}
            if not numbers <= depths:
                raise InvalidArgumentError(
                    f"layers: {sorted(numbers - depths)} named in {layers!r} are not among the "
                    f"layers 0 to {max(depths)}"
                )
            chosen = {site: dim for site, dim in chosen.items() if _layer(site) in numbers}
        return dict(sorted(chosen.items()))


def load_training_base(
    spec: str, kind: Kind, dtype: torch.dtype, tokenizer: str = ""
) -> TrainingBase:
    """Loads a base model; see `redmux_adapters.load_base` for the arguments and errors."""
    load = {"causal": load_base, "seq2seq": load_seq2seq_base, "classifier": load_encoder}[kind]
    model, tokenizer = load(spec, dtype, tokenizer)
    # Adapters are passed on, folders of this machine mean nothing elsewhere.
    name = Path(spec).resolve().name if Path(spec).expanduser().exists() else spec
    return TrainingBase.of(model, tokenizer, name, kind)


def load_without_weights(
    spec: str, kind: Kind, fingerprint: str = "", tokenizer: str = ""
) -> TrainingBase:
    """Returns a base whose weights have shapes and no values, which is enough for checks.

    Raises what `redmux_adapters.load_base` does.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        GenerationConfig,
    )

    classes: dict[Kind, Any] = {
        "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM, "classifier": AutoModel
    }  # fmt: skip
    with torch.device("meta"):
        model = classes[kind].from_config(read_config(spec))
    with suppress(OSError):  # where the checkpoint has none, the model's own stays
        model.generation_config = GenerationConfig.from_pretrained(resolve(spec))
    return TrainingBase("", kind, model, load_tokenizer(spec, tokenizer), fingerprint)


def _parse_layers(layers: str) -> set[int] | None:
    if layers == "all":
        return None
    numbers: set[int] = set()
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise InvalidArgumentError(
                f'layers is {layers!r}; it has to be "all" or numbers and ranges such as "0-5,11"'
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _layer(site: str) -> int:
    """Returns the number of the layer that a site is in, -1 for none."""
    return next((int(part) for part in site.split(".") if part.isdigit()), -1)
