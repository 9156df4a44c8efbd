"""A small base, as far as the registry knows one, and adapters for it."""

import pytest
import torch

from redmux_adapters import Adapter, Edit, Head, HeadConfig, to_bytes
from redmux_adapters.format.head import MAX_LABELS
from redmux_server.registry.database import Database
from redmux_server.registry.registry import AdapterRegistry

FINGERPRINT = "tiny-2x4-0"
SITES = {"model.layers.0.mlp.down_proj": 4, "model.layers.1.mlp.down_proj": 4}


def large_head(size: int) -> Head:
    """The head with the most values that a model of this hidden size can be given."""
    labels = [str(i) for i in range(MAX_LABELS)]
    shapes = {"dense": size, "out_proj": MAX_LABELS}
    tensors = {f"{name}.weight": torch.ones(n, size) for name, n in shapes.items()}
    tensors |= {f"{name}.bias": torch.ones(n) for name, n in shapes.items()}
    return Head(HeadConfig("roberta", labels, "multi_label_classification"), tensors)


def small_adapter(seed: int, fingerprint: str = FINGERPRINT, sites=SITES, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    edits = {
        site: Edit(torch.randn(dim, generator=generator), torch.randn(dim, generator=generator))
        for site, dim in sites.items()
    }
    return Adapter(base_fingerprint=fingerprint, edits=edits, **fields)


@pytest.fixture(scope="session")
def adapters():
    """A few distinct adapters."""
    return [small_adapter(seed) for seed in range(4)]


@pytest.fixture(scope="session")
def files(adapters):
    """The bytes of each of `adapters`."""
    return [to_bytes(adapter) for adapter in adapters]


@pytest.fixture(scope="session")
def make_adapter():
    return small_adapter


@pytest.fixture(scope="session")
def make_head():
    return large_head


@pytest.fixture(scope="session")
def open_registry():
    """Opens a registry in a folder or at a URL as a starting server does, or one in memory."""

    def open_registry(place=None, **options):
        database = None
        if place is not None:
            database = Database.at(place) if isinstance(place, str) else Database.in_folder(place)
        return AdapterRegistry(FINGERPRINT, SITES, database, **options)

    return open_registry


@pytest.fixture(params=["sqlite", "postgresql"])
def open_kept(request, tmp_path, open_registry):
    """Opens one registry over and over, as servers do that start one after the other."""
    is_sqlite = request.param == "sqlite"
    place = tmp_path if is_sqlite else request.getfixturevalue("postgresql").new_database()
    registries = []

    def open_kept(**options):
        registries.append(open_registry(place, **options))
        return registries[-1]

    open_kept.place = place
    yield open_kept
    for registry in registries:
        registry._database.close()
