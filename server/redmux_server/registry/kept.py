"""KeptVersions: the versions of the registry as objects that requests hold."""

import functools
import hashlib
import json
import logging
from datetime import UTC, datetime

from redmux.errors import DataLossError, FailedPreconditionError, RedmuxError
from redmux_adapters import Adapter, Summary, to_bytes
from redmux_adapters.format.config import config_value, parse_config
from redmux_adapters.format.files import summary_of
from redmux_server.registry import catalogue
from redmux_server.registry.catalogue import Version
from redmux_server.registry.changes import NewVersion
from redmux_server.registry.database import Database
from redmux_server.registry.names import Reference
from redmux_server.registry.published import Published, Rules
from redmux_server.registry.recent import RecentVersions

logger = logging.getLogger(__name__)


class KeptVersions:
    """Turns adapters into rows, and rows into what reads their vectors.

    Belongs to the event loop, but for `checked`.
    """

    def __init__(self, database: Database, rules: Rules) -> None:
        self.recent = RecentVersions()
        self._database = database
        self._rules = rules

    async def find(self, reference: Reference, tenant: str) -> Version | None:
        """Returns the version that a tenant refers to, None where there is none that it sees."""
        read = functools.partial(catalogue.find, reference=reference, tenant=tenant)
        return await self._database.read(read)

    def checked(self, safetensors: bytes, config_json: str) -> tuple[Adapter, NewVersion]:
        """Returns an adapter, and what is kept of it: equal ones are equal bytes.

        Raises as `Rules.parse` does. From any thread.
        """
        adapter = self._rules.parse(safetensors, config_json)
        data, summary = to_bytes(adapter), summary_of(adapter)
        new = NewVersion(
            adapter.digest, hashlib.sha256(data).hexdigest(), data,
            adapter.base_fingerprint, json.dumps(config_value(summary.config)),
            summary.num_sites, summary.num_parameters, summary.num_head_parameters,
        )  # fmt: skip
        return adapter, new

    def published(self, version: Version, *, is_checked: bool = True) -> Published:
        """Returns the object that stands for a version.

        Raises FailedPreconditionError for one that this base model cannot have, unless that shall
        not be checked.
        """
        held = self.recent.get(version.id)
        if held is not None:
            return held
        config = parse_config(version.config)
        if is_checked:
            try:
                self._rules.check(config)
            except RedmuxError as err:
                raise FailedPreconditionError(
                    f"the stored adapter {version.name!r} cannot be used: {err.message}"
                ) from None
        summary = Summary(
            config, version.digest, version.num_sites, version.num_parameters,
            version.num_head_parameters,
        )  # fmt: skip
        published = Published(
            version.name, summary, functools.partial(self._read_blob, version), self._rules,
            version.owner, number=version.number,
            created_at=datetime.fromtimestamp(version.created_us / 1e6, UTC),
        )  # fmt: skip
        if is_checked:
            self.recent.add(version.id, published)
        return published

    def _read_blob(self, version: Version) -> bytes:
        """Returns the file of a version; blocks, from any thread."""
        try:
            return self._database.read_now(functools.partial(catalogue.blob, version=version))
        except DataLossError as err:
            logger.error("adapter %s was damaged in %s: %s", version.label, self._database.place,
                         err.message)  # fmt: skip
            raise DataLossError(catalogue.damaged(version)) from None
