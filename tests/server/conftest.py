"""A small base, as far as the registry knows one, and adapters for it."""

import pytest
import torch

from redmux_adapters import Adapter, Edit, Head, HeadConfig, to_bytes
from redmux_adapters.format.head import MAX_LABELS
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
    """Opens a registry over a folder as a starting server does; `unusable` is set on it."""

    def open_registry(folder=None, **options):
        registry = AdapterRegistry(FINGERPRINT, SITES, folder, **options)
        registry.unusable = registry.load_folder() if folder is not None else []
        return registry

    return open_registry
