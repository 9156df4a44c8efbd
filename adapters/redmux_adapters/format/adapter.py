"""A RED adapter: vectors that edit the outputs of chosen modules, and what they were made for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from redmux.errors import InvalidAdapterError

from ..bases.fingerprint import fingerprint
from ..bases.match import BaseMatch, require_base
from ..bases.sites import ffn_sites
from .config import AdapterConfig, AdapterMetadata
from .head import Head
from .header import check_site
from .prompt import PromptFormat
from .vectors import Vectors, check_values, digest_of
from .window import ALL


@dataclass(frozen=True, eq=False)
class Edit:
    """The edit of one module's output h: scale * h + bias (RED, arXiv 2402.15179, section 3).

    Both are vectors of the module's output size, kept as own fp32 copies on the CPU that nobody
    may write to. Construction raises InvalidAdapterError for other shapes.
    """

    scale: Tensor  # [dim]
    bias: Tensor  # [dim]

    def __post_init__(self) -> None:
        for name in ("scale", "bias"):
            vector: Tensor = getattr(self, name)
            if vector.dim() != 1 or vector.numel() == 0 or not vector.dtype.is_floating_point:
                raise InvalidAdapterError(
                    f"{name} has shape {list(vector.shape)} and dtype {vector.dtype}; it has to be "
                    "a floating-point vector"
                )
            own = vector.detach().to("cpu", torch.float32, copy=True).contiguous()
            object.__setattr__(self, name, own)
        if self.scale.shape != self.bias.shape:
            raise InvalidAdapterError(
                f"scale has {len(self.scale)} values and bias {len(self.bias)}; they have to be "
                "the same"
            )

    @classmethod
    def adopt(cls, scale: Tensor, bias: Tensor) -> "Edit":
        """Returns the edit of two fp32 CPU vectors of one size, which are kept without a copy."""
        edit = object.__new__(cls)
        object.__setattr__(edit, "scale", scale)
        object.__setattr__(edit, "bias", bias)
        return edit

    @classmethod
    def identity(cls, dim: int) -> "Edit":
        """Returns the edit that changes nothing, where training starts: scale 1, bias 0."""
        return cls(torch.ones(dim), torch.zeros(dim))

    @property
    def dim(self) -> int:
        """The output size of the module."""
        return self.scale.numel()


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """An immutable RED adapter; safe to share between threads.

    `edits` maps module paths to edits and is kept sorted by path. Construction checks everything:
    it raises InvalidAdapterError for no edits, for impossible module paths and for values that are
    not finite or exceed 1e4 in magnitude. Adapters are equal where digest and metadata are.
    """

    base_fingerprint: str
    edits: Mapping[str, Edit]
    prompt_format: PromptFormat | None = None
    metadata: AdapterMetadata = field(default_factory=AdapterMetadata)
    head: Head | None = None
    apply: str = ALL  # which tokens are edited, see `check_apply`
    # "sha256:" and 64 hexadecimal digits over the five fields that decide what is computed.
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        AdapterConfig(self.base_fingerprint, apply=self.apply)
        if not self.edits:
            raise InvalidAdapterError("an adapter edits at least one module")
        for site in self.edits:
            check_site(site)
        vectors = self.vectors()
        head_config = None if self.head is None else self.head.config
        head = {} if self.head is None else self.head.arrays()
        check_values(vectors, head)
        digest = digest_of(
            self.base_fingerprint, self.prompt_format, vectors, head_config, head, self.apply
        )
        object.__setattr__(self, "edits", MappingProxyType(dict(sorted(self.edits.items()))))
        object.__setattr__(self, "digest", digest)

    @classmethod
    def identity(
        cls,
        sites: Mapping[str, int] | nn.Module,
        base_fingerprint: str | None = None,
        *,
        prompt_format: PromptFormat | None = None,
        metadata: AdapterMetadata | None = None,
    ) -> "Adapter":
        """Returns the adapter that changes nothing, of {module path: output size} or of a model.

        A model stands for its FFN outputs and its own fingerprint; with a mapping the fingerprint
        has to be given.
        """
        if isinstance(sites, nn.Module):
            base_fingerprint = base_fingerprint or fingerprint(sites)
            sites = ffn_sites(sites)
        edits = {site: Edit.identity(dim) for site, dim in sites.items()}
        return cls(base_fingerprint or "", edits, prompt_format, metadata or AdapterMetadata())

    @property
    def sites(self) -> dict[str, int]:
        """The edited module paths with their output sizes, sorted by path."""
        return {site: edit.dim for site, edit in self.edits.items()}

    @property
    def num_parameters(self) -> int:
        """Number of values of scales and biases; the paper does not count heads either."""
        return 2 * sum(self.sites.values())

    @property
    def nbytes(self) -> int:
        """Size in memory, of the vectors and of the head."""
        return 4 * (self.num_parameters + (self.head.num_parameters if self.head else 0))

    def vectors(self) -> Vectors:
        """Returns {module path: (scale, bias)} as views that nobody may write to."""
        return {s: (e.scale.numpy(), e.bias.numpy()) for s, e in self.edits.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        return self.digest == other.digest and self.metadata == other.metadata

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Adapter({self.digest[:19]}, base={self.base_fingerprint}, "
            f"sites={len(self.edits)}, parameters={self.num_parameters})"
        )


def check_base(
    adapter: Adapter | AdapterConfig, fingerprint: str, allow_other: bool = False
) -> BaseMatch:
    """Returns how the base that the adapter was made for compares with base `fingerprint`.

    Raises WrongBaseError, naming both, for another architecture or size, and unless `allow_other`
    for other weights or another vocabulary.
    """
    return require_base(adapter.base_fingerprint, fingerprint, allow_other)
