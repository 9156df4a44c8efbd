"""Offer: what the routers serve from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from redmux_server.config import ServerConfig
from redmux_server.engine.engine import Engine
from redmux_server.http_api.health import Health
from redmux_server.http_api.names import ModelNames
from redmux_server.metrics import Metrics
from redmux_server.models.text import TextCodec
from redmux_server.registry.registry import AdapterRegistry
from redmux_server.services.pinning import Pinned
from redmux_server.wiring import Desk, Services


@dataclass(frozen=True, slots=True)
class Offer:
    """A loaded server, as far as HTTP has to know it."""

    config: ServerConfig
    services: Services
    desk: Desk
    engine: Engine
    metrics: Metrics
    registry: AdapterRegistry
    names: ModelNames
    codec: TextCodec
    health: Health
    fingerprint: str  # of the base model
    created_s: int  # when the base model was loaded, since the epoch
    on_change: Callable[[], None]  # told of every change of adapters


def applied(published: Pinned | None, **more: Any) -> Mapping[str, Any]:
    """Returns what answers tell under `redmux`: the adapter that was applied, and `more`."""
    if published is None:
        return {"adapter": None, "digest": None, **more}
    return {"adapter": published.name, "digest": published.digest, **more}


def adapter_header(published: Pinned | None) -> dict[str, str]:
    """Returns the header that tells the digest of the adapter that was applied."""
    return {"x-redmux-adapter": "base" if published is None else published.digest}
