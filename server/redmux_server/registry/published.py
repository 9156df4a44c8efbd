"""Published: an adapter under its name, whose vectors are read when somebody needs them."""

import logging
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from redmux.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidAdapterError,
    NotFoundError,
)
from redmux_adapters import (
    Adapter,
    BaseMatch,
    Limits,
    PromptFormat,
    Summary,
    check_base,
    match_bases,
    parse_adapter,
    summarize,
)
from redmux_adapters.format.config import AdapterConfig
from redmux_adapters.format.files import parse_known, read_file
from redmux_adapters.format.head import KINDS, MAX_LABELS
from redmux_adapters.format.window import ALL
from redmux_server.registry.stamp import Stamp
from redmux_server.registry.tenants import OPERATOR

logger = logging.getLogger(__name__)

_HEADER_BYTES = 512 << 10
_HEAD_TENSORS = max(map(len, KINDS.values()))


class Rules(NamedTuple):
    """What every file of one base has to keep to."""

    base_fingerprint: str
    expected_sites: Mapping[str, int]
    limits: Limits
    head_size: int  # hidden size that heads are for, 0 where none are applied
    head_kinds: Collection[str]  # that the base model can have
    # Raises WrongBaseError where the base's tokenizer has not the format's special tokens.
    check_format: Callable[[PromptFormat | None], None] = lambda prompt_format: None
    allow_other_base: bool = False
    has_windows: bool = True  # whether adapters may edit some of the tokens alone

    def parse(self, safetensors: bytes, config_json: str) -> Adapter:
        """Returns the adapter in a file; raises InvalidAdapterError and what `check` raises."""
        return parse_adapter(
            safetensors, config_json, expected_sites=self.expected_sites,
            hidden_size=self.head_size or None, check_config=self.check, limits=self.limits,
        )  # fmt: skip

    def summarize(self, safetensors: bytes, config_json: str | None) -> Summary:
        """Returns what `parse` would, but for its vectors; raises as it does."""
        return summarize(
            safetensors, config_json, expected_sites=self.expected_sites,
            hidden_size=self.head_size or None, check_config=self.check, limits=self.limits,
        )  # fmt: skip

    def check(self, config: AdapterConfig) -> None:
        """Raises WrongBaseError, or FailedPreconditionError for a head that nothing would apply."""
        check_base(config, self.base_fingerprint, self.allow_other_base)
        self.check_format(config.prompt_format)
        if config.apply != ALL and not self.has_windows:
            raise FailedPreconditionError(
                f"the adapter edits {config.apply!r} alone, and this server's model is no decoder; "
                "its adapters edit all tokens"
            )
        if config.head is None:
            return
        if not self.head_size:
            raise FailedPreconditionError(
                "the adapter brings a classification head, which needs an encoder, and this server "
                "does not serve one; put it to one that does, or put the adapter without its head"
            )
        if config.head.kind not in self.head_kinds:
            raise FailedPreconditionError(
                f"the adapter's head is of kind {config.head.kind!r}, which stands on the base "
                "model's pooler, and this base model has none"
            )


def rules_of(
    base_fingerprint: str,
    sites: Mapping[str, int],
    head_size: int,
    head_kinds: Collection[str],
    check_format: Callable[[PromptFormat | None], None],
    allow_other_base: bool,
    has_windows: bool = True,
) -> Rules:
    """Returns the rules of a base with these editable modules; see `Rules`."""
    # Every editable module and the largest head in fp32, and room for the header.
    num_head_values = (head_size + 1) * (head_size + MAX_LABELS) if head_size else 0
    num_values = 2 * sum(sites.values()) + num_head_values
    limits = Limits(
        file_bytes=4 * num_values + _HEADER_BYTES, header_bytes=_HEADER_BYTES,
        num_tensors=2 * len(sites) + (_HEAD_TENSORS if head_size else 0),
    )  # fmt: skip
    return Rules(
        base_fingerprint,
        sites,
        limits,
        head_size,
        head_kinds,
        check_format,
        allow_other_base,
        has_windows,
    )


class Published:
    """One version of a name. Whoever holds it can read exactly this version, whatever comes next.

    The vectors are a row of the registry, a file, or the bytes they came in. Before a row is
    removed, `detach` takes its bytes into memory, where they stay for as long as somebody holds
    this object. What is read is checked against the digest that was published.
    """

    __slots__ = (
        "__weakref__", "_data", "_rules", "_source", "created_at", "name", "number", "owner",
        "stamp", "summary",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        summary: Summary,
        source: Path | bytes | Callable[[], bytes],
        rules: Rules,
        owner: str = OPERATOR,
        *,
        number: int = 0,
        created_at: datetime | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        """`source` is the file of the vectors, their bytes, or what reads these.

        `number` is 0 for what the registry does not keep, `stamp` what told its file apart.
        """
        self.name = name
        self.owner = owner
        self.summary = summary
        self.number = number
        self.stamp = stamp
        self.created_at = created_at or datetime.now(UTC)
        self._source = source
        self._data = source if isinstance(source, bytes) else None
        self._rules = rules

    @property
    def digest(self) -> str:
        """Digest of the adapter."""
        return self.summary.digest

    @property
    def reference(self) -> str:
        """What refers to this very version; a mere name for what the registry does not keep."""
        return f"{self.name}@{self.number}" if self.number else self.name

    @property
    def base_match(self) -> BaseMatch:
        """How the base that the adapter was made for compares with the one at hand."""
        return match_bases(self.summary.config.base_fingerprint, self._rules.base_fingerprint)

    def read(self) -> Adapter:
        """Returns the adapter; blocks on the disk, from any thread.

        Raises DataLossError if what is kept was damaged or removed since it was published,
        ResourceExhaustedError if the system cannot open it now, UnavailableError if a database does
        not answer, and NotFoundError if another server has deleted it there.
        """
        try:
            data = self._read_bytes()
        except (DataLossError, NotFoundError):
            if self._data is None:  # else it was detached meanwhile
                raise
            data = self._data
        try:
            return self._parse(data)
        except InvalidAdapterError as err:
            raise self._lost(err) from None

    def detach(self, data: bytes) -> None:
        """Takes the bytes into memory; call it before they are removed where they are kept."""
        self._data = data

    def _read_bytes(self) -> bytes:
        if self._data is not None:
            return self._data
        if isinstance(self._source, Path):
            try:
                return read_file(self._source, self._rules.limits.file_bytes)
            except InvalidAdapterError as err:
                raise self._lost(err) from None
        assert callable(self._source)
        return self._source()

    def _lost(self, err: InvalidAdapterError) -> DataLossError:
        logger.error("adapter %s was damaged: %s", self.reference, err)
        return DataLossError(
            f"the file of adapter {self.name!r} is no longer what was published as "
            f"{self.digest}; put the adapter again"
        )

    def _parse(self, data: bytes) -> Adapter:
        adapter = parse_known(
            data,
            self.summary.config,
            expected_sites=self._rules.expected_sites,
            hidden_size=self._rules.head_size or None,
            limits=self._rules.limits,
        )
        if adapter.digest != self.digest:
            raise InvalidAdapterError(f"it holds {adapter.digest}")
        return adapter
